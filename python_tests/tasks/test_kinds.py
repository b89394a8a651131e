"""Named entities, questions, multiple choice and several labels a text: what files say, and how answers are scored."""

import json
import re

import datasets
import numpy as np
import pytest
import seqeval.metrics
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ticketops.errors import InputError
from ticketops.tasks import ChoiceTask, EntityTask, QuestionTask, SequenceTask, load_task, tokenize
from ticketops.tasks.metrics import answer_scores, entity_scores

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghij", "##x", "who", "where", "?", ".", "Ada", "Bob", "Rome"]


@pytest.fixture(scope="module")
def tokenizer():
    bare = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="[PAD]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answers_of(task, tokenizer, answers, max_length=16):
    """Inputs of the validation rows, and logits that give each of them an answer."""
    inputs = tokenize(task.validation, task, tokenizer, max_length, scored=True)
    width = max(map(len, inputs["input_ids"][:]))
    logits = np.full((len(inputs), width, task.num_labels), -1.0)
    for row, chosen in enumerate(answers(inputs)):
        for place, answer in chosen:
            logits[row, place, answer] = 1.0
    return task.score(logits, inputs, task.validation)


# Named entities.

SENTENCES = [
    {"tokens": ["Ada", "met", "Bob"], "ner_tags": ["B-PER", "O", "B-PER"]},
    {"tokens": ["Rome", "ax", "Ada", "a"], "ner_tags": ["B-LOC", "O", "B-PER", "I-PER"]},
]
CONLL = """-DOCSTART- -X- O

Ada NNP B-PER
met VBD O
Bob NNP B-PER


Rome NNP B-LOC
ax X O
Ada NNP B-PER
a X I-PER
"""


def test_tags_are_the_same_in_every_layout(tmp_path):
    names = ["O", "B-LOC", "B-PER", "I-PER"]
    numbers = [{**row, "ner_tags": [names.index(tag) for tag in row["ner_tags"]]} for row in SENTENCES]
    types = {
        "tokens": datasets.List(datasets.Value("string")),
        "ner_tags": datasets.List(datasets.ClassLabel(names=names)),
    }
    folders = {name: tmp_path / name for name in ("jsonl", "conll", "tabs", "parquet", "saved")}
    for split in ("train", "dev"):
        for folder in folders.values():
            folder.mkdir(exist_ok=True)
        write(folders["jsonl"] / f"{split}.jsonl", SENTENCES)
        (folders["conll"] / f"{split}.conll").write_text(CONLL)
        (folders["tabs"] / f"{split}.iob2").write_text(re.sub(" .* ", "\t", CONLL))
        table = datasets.Dataset.from_list(numbers, features=datasets.Features(types))
        table.to_parquet(folders["parquet"] / f"{split}.parquet")
    datasets.DatasetDict({"train": table, "validation": table}).save_to_disk(folders["saved"])
    tasks = {name: load_task(folder) for name, folder in folders.items()}
    for name, task in tasks.items():
        assert isinstance(task, EntityTask), name
        assert task.labels == tuple(names)
        assert task.train[:] == tasks["jsonl"].train[:]
        assert task.majority() == 0.0
    assert "4 labels (O, B-LOC, B-PER, I-PER)" in tasks["conll"].describe()


def test_the_first_token_of_a_word_has_its_tag(tmp_path, tokenizer):
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", SENTENCES)
    task = load_task(tmp_path)
    inputs = tokenize(task.train, task, tokenizer, 16)
    # [CLS] Rome a ##x Ada a [SEP]
    ids = [task.labels.index(tag) for tag in ("B-LOC", "O", "B-PER", "I-PER")]
    assert inputs[1]["labels"] == [-100, ids[0], ids[1], -100, ids[2], ids[3], -100]
    batch = task.collator(tokenizer)([inputs[0], inputs[1]])
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 7)
    assert batch["labels"][0, 4:].tolist() == [-100] * 3


def test_words_that_were_cut_off_are_answered_by_o(tmp_path, tokenizer):
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", SENTENCES)
    task = load_task(tmp_path)

    def right(inputs):
        for words, row in zip(inputs["words"][:], task.validation["label"][:], strict=True):
            yield [(place, row[word]) for place, word in enumerate(words) if word >= 0]

    assert answers_of(task, tokenizer, right)["entity_f1"] == 1.0
    # [CLS] Rome a ##x [SEP]: of four entities three are left.
    assert answers_of(task, tokenizer, right, max_length=5)["entity_recall"] == 0.75
    assert answers_of(task, tokenizer, lambda inputs: [[], []])["entity_f1"] == 0.0


@pytest.mark.parametrize(
    ("tags", "predicted", "f1"),
    [
        (["B-A", "I-A", "O", "B-B"], ["B-A", "I-A", "O", "B-A"], 0.5),
        # Another kind goes on: no entity is right.
        (["B-A", "I-A", "O", "O"], ["B-A", "I-B", "O", "O"], 0.0),
        # IOB1, where I begins an entity that nothing touches.
        (["I-A", "I-A", "O", "I-B"], ["I-A", "I-A", "O", "I-B"], 1.0),
        (["B-A", "E-A", "O", "S-B"], ["B-A", "E-A", "O", "O"], 2 / 3),
        (["B-A", "L-A", "O", "U-B"], ["B-A", "L-A", "U-B", "U-B"], 0.8),
        (["O", "O", "O", "O"], ["O", "O", "O", "O"], 0.0),
    ],
)
def test_entities_count_whole(tags, predicted, f1):
    scores = entity_scores([tags], [predicted])
    assert scores["entity_f1"] == pytest.approx(f1)
    if not {"L", "U"} & {tag[0] for tag in tags}:
        assert scores["entity_f1"] == seqeval.metrics.f1_score([tags], [predicted], zero_division=0)
        assert scores["entity_precision"] == seqeval.metrics.precision_score([tags], [predicted], zero_division=0)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["Ada"], "ner_tags": ["PER"]}, r"line 2: tag 'PER' .* follows no scheme .* write B-PER"),
        ({"tokens": ["Ada"], "ner_tags": ["B-"]}, r"line 2: tag 'B-' .* follows no scheme"),
        ({"tokens": ["Ada"], "ner_tags": [3]}, r"line 2: tag 3 .* is a number without a name"),
        ({"tokens": ["Ada"], "ner_tags": ["O", "O"]}, r"line 2: 1 word with 2 tags: give a tag for each word"),
        ({"tokens": "Ada", "ner_tags": ["O"]}, r"line 2: column tokens holds 'Ada': give the list"),
        ({"tokens": [None], "ner_tags": ["O"]}, r"line 2: no text in column tokens"),
        ({"tokens": ["Ada"], "ner_tags": "O"}, r"line 2: column ner_tags holds 'O': give the list"),
        ({"tokens": [], "ner_tags": []}, r"line 2: column tokens holds \[\]"),
    ],
)
def test_bad_tags_are_one_line(tmp_path, row, message):
    with pytest.raises(InputError, match=message) as caught:
        load_task(write(tmp_path / "train.jsonl", [SENTENCES[0], row]))
    assert "\n" not in str(caught.value)


def test_a_conll_file_with_a_line_of_other_fields_is_refused(tmp_path):
    (tmp_path / "train.conll").write_text("Ada B-PER\nmet\n")
    with pytest.raises(InputError, match=r"train.conll, line 2: 1 field, where a word and its tag belong"):
        load_task(tmp_path / "train.conll")


@pytest.mark.parametrize(
    "row",
    [
        {"words": "a b c", "sentence": "a b c", "label": 1},
        {"question": "is it?", "context": "a b", "sentence": "a b", "answer": True, "label": 1},
        {"options": "a or b", "sentence": "a b", "label": 1},
    ],
)
def test_columns_of_other_values_are_no_other_kind(tmp_path, row):
    rows = [{**row, "sentence": f"{row['sentence']} {number}", "label": number % 2} for number in range(20)]
    assert load_task(write(tmp_path / "train.jsonl", rows), text_columns=None).kind == "classification"


# Questions.

CONTEXT = "a b c Ada d e f Rome g h i j ."
QUESTIONS = [
    {"id": "1", "question": "who ?", "context": CONTEXT, "answers": {"text": ["Ada"], "answer_start": [6]}},
    {
        "id": "2",
        "question": "where ?",
        "context": CONTEXT,
        "answers": {"text": ["Rome", "f Rome"], "answer_start": [16, 14]},
    },
]
NOTHING = {"id": "3", "question": "who where ?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}}


@pytest.fixture
def questions(tmp_path):
    for split, rows in (("train", [*QUESTIONS, NOTHING]), ("dev", [*QUESTIONS, NOTHING])):
        write(tmp_path / f"{split}.jsonl", rows)
    return load_task(tmp_path)


def test_questions_are_the_same_in_every_layout(tmp_path, questions):
    nested = {
        "version": "2.0",
        "data": [
            {
                "title": "t",
                "paragraphs": [
                    {
                        "context": CONTEXT,
                        "qas": [
                            {
                                "id": row["id"],
                                "question": row["question"],
                                "answers": [
                                    {"text": text, "answer_start": start}
                                    for text, start in zip(*row["answers"].values(), strict=True)
                                ],
                            }
                            for row in (*QUESTIONS, NOTHING)
                        ],
                    }
                ],
            }
        ],
    }
    folder = tmp_path / "nested"
    folder.mkdir()
    for split in ("train", "dev"):
        (folder / f"{split}.json").write_text(json.dumps(nested))
    task = load_task(folder)
    assert isinstance(task, QuestionTask)
    assert task.validation[:] == questions.validation[:]
    assert task.columns == ("question", "context")


def spans(inputs, wanted):
    """Scores of 5 for the given characters of the context, in each window that has them."""
    for row, offsets in zip(inputs["row"][:], inputs["offsets"][:], strict=True):
        first, last = wanted[row]
        yield [(p, 0) for p, (start, _) in enumerate(offsets) if start == first] + [
            (p, 1) for p, (_, end) in enumerate(offsets) if end == last
        ]


@pytest.mark.parametrize("max_length", [12, 32])
def test_the_best_span_of_all_windows_is_the_answer(questions, tokenizer, max_length):
    inputs = tokenize(questions.validation, questions, tokenizer, max_length, scored=True)
    assert (len(inputs) > 3) == (max_length == 12)
    width = max(map(len, inputs["input_ids"][:]))
    logits = np.full((len(inputs), width, 2), -1.0)
    for window, chosen in enumerate(spans(inputs, {0: (6, 9), 1: (14, 20), 2: (None, None)})):
        for place, side in chosen:
            logits[window, place, side] = 5.0
    for window, row in enumerate(inputs["row"][:]):
        if row == 2:
            logits[window, 0] = 5.0
    assert questions.answers(logits, inputs, questions.validation) == ["Ada", "f Rome", ""]
    assert questions.score(logits, inputs, questions.validation) == {"f1": 1.0, "exact_match": 1.0}


@pytest.mark.parametrize("max_length", [12, 32])
def test_training_windows_point_at_the_answer(questions, tokenizer, max_length):
    inputs = tokenize(questions.train, questions, tokenizer, max_length)
    found = set()
    for row in inputs:
        first, last = row["start_positions"], row["end_positions"]
        assert set(row) == {"input_ids", "attention_mask", "token_type_ids", "start_positions", "end_positions"}
        if first:
            assert row["token_type_ids"][first] == 1
            found.add(tokenizer.decode(row["input_ids"][first : last + 1]))
        else:
            assert last == 0
    assert found == {"Ada", "Rome"}


def test_a_question_without_room_for_its_context_is_refused(questions, tokenizer):
    with pytest.raises(InputError, match=r"the question of row 1 .* has 2 tokens, and max_length 6 leaves 0 beside"):
        tokenize(questions.train, questions, tokenizer, 6)


@pytest.mark.parametrize(
    ("right", "answer", "f1", "exact"),
    [
        (["the Eiffel Tower"], "Eiffel tower!", 1.0, 1.0),
        (["Ada Lovelace"], "Ada", 2 / 3, 0.0),
        (["Ada Lovelace", "Ada"], "Ada", 1.0, 1.0),
        (["a b b"], "b b b", 0.8, 0.0),
        ([], "", 1.0, 1.0),
        ([], "Ada", 0.0, 0.0),
        (["Ada"], "", 0.0, 0.0),
        (["the"], "", 1.0, 1.0),
    ],
)
def test_answers_are_scored_as_squad_does(right, answer, f1, exact):
    assert answer_scores([right], [answer]) == {"f1": pytest.approx(f1), "exact_match": exact}


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"text": ["Eve"], "answer_start": [6]}, r"line 3: the answer 'Eve' is not in its context at character 6"),
        ({"text": ["Ada"], "answer_start": [7]}, r"line 3: the answer 'Ada' is not in its context at character 7"),
        (["Eve"], r"line 3: the answer 'Eve' is not in its context: correct it"),
        ({"text": ["Ada"], "answer_start": []}, r"line 3: column answers has 1 answer with 0 starts"),
        (7, r"line 3: column answers holds 7: give the answers as SQuAD does"),
    ],
)
def test_bad_answers_are_one_line(tmp_path, answers, message):
    with pytest.raises(InputError, match=message) as caught:
        load_task(write(tmp_path / "train.jsonl", [*QUESTIONS, {**QUESTIONS[0], "answers": answers}]))
    assert "\n" not in str(caught.value)


def test_a_constant_answer_to_questions(questions):
    # "no answer" is right once in three times.
    assert questions.majority() == pytest.approx(1 / 3)


def test_held_out_questions_share_no_context(tmp_path):
    rows = [{**row, "context": f"{CONTEXT} {number}"} for number in range(10) for row in QUESTIONS]
    task = load_task(write(tmp_path / "train.jsonl", rows))
    assert not {*task.train["context"]} & {*task.validation["context"]}


# Multiple choice.

NAMED = {"text": ["Ada", "Bob"], "label": ["x", "y"]}
LISTED = {"premise": "a b", "question": "who ?", "choices": ["Ada", "Bob"], "label": 1}


@pytest.mark.parametrize(
    "row",
    [
        LISTED,
        {"premise": "a b", "question": "who ?", "choice1": "Ada", "choice2": "Bob", "label": 1},
        {"sent1": "a b", "sent2": "who ?", "ending0": "Ada", "ending1": "Bob", "label": "1"},
        {"article": "a b", "question": "who ?", "options": ["Ada", "Bob"], "answer": "B"},
        {"context": "a b", "question": "who ?", "answerA": "Ada", "answerB": "Bob", "label": "2"},
        {
            "context": "a b",
            "question": "who ?",
            "choices": {"text": ["Ada", "Bob"], "label": ["x", "y"]},
            "answerKey": "y",
        },
        {"premise": "a b", "question": "who ?", "choices": ["Ada", "Bob"], "answer": "Bob"},
    ],
)
def test_choices_are_the_same_in_every_layout(tmp_path, tokenizer, row):
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", [row] * 2)
    task = load_task(tmp_path)
    assert isinstance(task, ChoiceTask)
    assert task.num_labels == 2
    assert task.majority() == 1.0
    inputs = tokenize(task.train, task, tokenizer, 16)
    texts = [tokenizer.decode(ids) for ids in inputs[0]["input_ids"]]
    assert texts == ["[CLS] a b [SEP] who ? Ada [SEP]", "[CLS] a b [SEP] who ? Bob [SEP]"]
    assert inputs["labels"][0] == 1
    batch = task.collator(tokenizer)([inputs[0], inputs[1]])
    assert batch["input_ids"].shape == (2, 2, 8)
    assert task.score(np.array([[0.0, 1.0], [1.0, 0.0]]), inputs.select(range(2)), task.train) == {"accuracy": 0.5}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**LISTED, "choices": ["Ada"]}, r"line 2: 1 choice, where the first training row has 2"),
        ({**LISTED, "label": 5}, r"line 2: answer 5 in column label is none of the 2 choices"),
        ({**LISTED, "choices": "Ada"}, r"line 2: column choices holds 'Ada': give the list"),
        ({**LISTED, "choices": ["Ada", None]}, r"line 2: no text in column choices"),
    ],
)
def test_bad_choices_are_one_line(tmp_path, row, message):
    with pytest.raises(InputError, match=message):
        load_task(write(tmp_path / "train.jsonl", [LISTED, row]))


# Several labels a text.


@pytest.mark.parametrize("layout", ["lists", "numbers", "csv", "columns"])
def test_label_sets_are_the_same_in_every_layout(tmp_path, layout):
    sets = [["sad", "wet"], [], ["wet"], ["dry"]] * 5
    names = ["dry", "sad", "wet"]
    texts = [f"text {number}" for number in range(len(sets))]
    options = {}
    if layout == "lists":
        write(tmp_path / "train.jsonl", [{"text": text, "labels": one} for text, one in zip(texts, sets, strict=True)])
    elif layout == "numbers":
        types = {"text": datasets.Value("string"), "labels": datasets.List(datasets.ClassLabel(names=names))}
        table = {"text": texts, "labels": [[names.index(name) for name in one] for one in sets]}
        datasets.Dataset.from_dict(table, features=datasets.Features(types)).to_parquet(tmp_path / "train.parquet")
    elif layout == "csv":
        lines = [f'{text},"{";".join(one)}"' for text, one in zip(texts, sets, strict=True)]
        (tmp_path / "train.csv").write_text("\n".join(["text,labels", *lines]) + "\n")
        options = {"kind": "multi-label"}
    else:
        lines = [
            f"{text},{','.join(str(int(name in one)) for name in names)}" for text, one in zip(texts, sets, strict=True)
        ]
        (tmp_path / "train.csv").write_text("\n".join(["text,dry,sad,wet", *lines]) + "\n")
        options = {"kind": "multi-label", "label_column": "dry,sad,wet"}
    task = load_task(tmp_path, **options)
    assert isinstance(task, SequenceTask)
    assert (task.kind, task.labels) == ("multi-label", tuple(names))
    rows = {row["text"]: row["label"] for part in (task.train, task.validation) for row in part}
    assert rows == {
        text: [names.index(name) for name in one] for text, one in zip(texts, map(sorted, sets), strict=True)
    }


def test_label_sets_are_scored_by_thresholds(tmp_path, tokenizer):
    rows = [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}, {"text": "c", "labels": ["y"]}]
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.jsonl", rows)
    task = load_task(tmp_path)
    inputs = tokenize(task.validation, task, tokenizer, 8)
    assert inputs["labels"][:] == [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]
    logits = np.array([[1.0, 1.0], [0.1, -1.0], [-1.0, 1.0]])
    # x: 1 right, 1 wrong; y: 2 right.
    scores = task.score(logits, inputs, task.validation)
    assert scores == {"micro_f1": pytest.approx(6 / 7), "macro_f1": pytest.approx((2 / 3 + 1) / 2)}
    # Always y: 2 right, 1 wrong, 1 missed.
    assert task.majority() == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "d", "labels": ["x", {}]}, r"line 4: label \{\} in column labels"),
        ({"text": "d", "labels": ["x", None]}, r"line 4: an empty label in column labels"),
        ({"text": "d", "labels": "x|y,z"}, r"line 4: label 'x\|y,z' in column labels has both \| and ,"),
    ],
)
def test_bad_label_sets_are_one_line(tmp_path, row, message):
    rows = [{"text": text, "labels": ["x", "y"]} for text in "abc"]
    with pytest.raises(InputError, match=message):
        load_task(write(tmp_path / "train.jsonl", [*rows, row]), kind="multi-label")


@pytest.mark.parametrize("kind", ["token-classification", "question-answering", "multiple-choice"])
def test_a_kind_without_its_columns_is_refused(tmp_path, kind):
    path = write(tmp_path / "train.jsonl", [{"text": "a", "score": 1.5}, {"text": "b", "score": 2.5}])
    with pytest.raises(InputError, match=r"train\.jsonl has the columns text, score|no known text column"):
        load_task(path, kind=kind)
