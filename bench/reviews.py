"""Makes a sentiment task from sentences of product reviews, as a target for transfer from film reviews. The data are
those of VADER (Hutto and Gilbert 2014, MIT licence).

    pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2
    python -m bench.reviews vaderSentiment-3.3.2.tar.gz OUTPUT/products --without DATA/sst2

A sentence's label is the sign of its mean human rating, in [-4, 4]. Sentences within 0.5 of neutral are left out, and
so are those that occur in the task given by --without.
"""

import argparse
import io
import json
import random
import re
import sys
import tarfile
from pathlib import Path

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt"
VALIDATION_ROWS = 800


def read(archive: Path) -> list[tuple[float, str]]:
    """Reads the mean human rating, in [-4, 4], and the text of each sentence."""
    with tarfile.open(archive) as outer, tarfile.open(fileobj=io.BytesIO(outer.extractfile(INNER).read())) as inner:
        content = inner.extractfile(FILE).read().decode("utf-8", errors="replace")
    fields = (line.split("\t") for line in content.splitlines() if line.strip())
    return [(float(rating), text.strip()) for _, rating, text in fields]


def words(text: str) -> str:
    """Normalises a text to its words, to find duplicates."""
    return " ".join(re.findall(r"\w+", text.lower()))


def main() -> int:
    """Writes train.jsonl and validation.jsonl."""
    parser = argparse.ArgumentParser(prog="python -m bench.reviews", description=__doc__.partition("\n")[0])
    parser.add_argument("archive", type=Path, help="the sdist of vaderSentiment 3.3.2")
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--without", type=Path, help="folder of a task whose sentences are left out")
    options = parser.parse_args()
    known = {
        words(json.loads(line)["sentence"])
        for file in (sorted(options.without.glob("*.jsonl")) if options.without else ())
        for line in file.read_text(encoding="utf-8").splitlines()
    }
    found = {
        words(text): (rating, text) for rating, text in read(options.archive) if abs(rating) >= 0.5 and words(text)
    }
    rows = [
        {"sentence": text, "label": "positive" if rating > 0 else "negative"}
        for key, (rating, text) in found.items()
        if key not in known
    ]
    print(f"{len(rows)} sentences, {len(found) - len(rows)} left out that occur in {options.without}")
    random.Random(0).shuffle(rows)
    options.output.mkdir(parents=True)
    for name, part in (("validation", rows[:VALIDATION_ROWS]), ("train", rows[VALIDATION_ROWS:])):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        positive = sum(row["label"] == "positive" for row in part)
        print(f"{name}: {len(part)} rows, {positive} positive")
    return 0


if __name__ == "__main__":
    sys.exit(main())
