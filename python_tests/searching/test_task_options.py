import json
import shlex

import pytest
import yaml

from ticketops.errors import InputError
from ticketops.searching.plan import SearchConfig
from ticketops.searching.sharing_plan import ShareConfig
from ticketops.searching.transfer_plan import TransferConfig

OPTIONS = ("text_columns", "label_column", "task_kind", "encoding")


def options(search: SearchConfig) -> tuple:
    return tuple(getattr(search, name) for name in OPTIONS)


def test_a_plain_value_is_for_every_task_and_a_named_one_for_that_task():
    config = ShareConfig(
        tasks="data/reviews.csv,./mails,rte",
        text_columns="body,reviews=title,text,mails=subject",
        label_column="stars,mails=spam",
        task_kind="reviews=regression",
        encoding="latin-1,reviews=utf_16",
    )
    assert options(config.search("data/reviews.csv")) == (("title", "text"), "stars", "regression", "utf-16")
    assert options(config.search("./mails")) == (("subject",), "spam", None, "iso8859-1")
    assert options(config.search("rte")) == (("body",), "stars", None, "iso8859-1")


@pytest.mark.parametrize("name", ["reviews", "reviews.csv.gz", "data/reviews.csv.gz"])
def test_a_task_goes_by_its_path_or_by_its_files_name(name):
    config = ShareConfig(tasks="data/reviews.csv.gz,rte", text_columns=f"{name}=a,b")
    assert config.search("data/reviews.csv.gz").text_columns == ("a", "b")
    assert config.search("rte").text_columns is None


def test_a_transfers_tasks_also_go_by_their_roles():
    config = TransferConfig(source="a/train.csv", target="b/train.csv", label_column="source=x,target=y")
    assert [config.search(spec).label_column for spec in ("a/train.csv", "b/train.csv")] == ["x", "y"]
    assert config.source_options == ["label_column"]
    both = TransferConfig(source="a", target="b", label_column="y", text_columns="target=t")
    assert both.source_options == []
    assert options(both.search("a")) == (None, "y", None, None)


@pytest.mark.parametrize(
    "value", [{"reviews": ["title", "a=b"], "rte": "q"}, ["reviews=title", "a=b", "rte=q"], "reviews=title,a=b,rte=q"]
)
def test_a_mapping_a_list_and_text_say_the_same(value):
    fields = {"tasks": "reviews.csv,rte", "text_columns": value}
    with pytest.raises(InputError, match="text_columns 'a=b' names none of the tasks"):
        ShareConfig.from_dict(fields)
    plain = json.loads(json.dumps(fields).replace("a=b", "body"))
    config = ShareConfig.from_dict(plain)
    assert config.search("reviews.csv").text_columns == ("title", "body")
    assert ShareConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    words = shlex.split(config.command())
    assert words[words.index("--text-columns") + 1] == "reviews=title,body,rte=q"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text_columns": "revews=a"}, "text_columns 'revews=a' names none of the tasks"),
        ({"label_column": "a,b"}, "label_column a,b gives one task several values"),
        ({"label_column": "rte=a,b"}, "label_column a,b gives one task several values"),
        ({"task_kind": "rte=ranking"}, "task_kind 'ranking' is unknown"),
        ({"encoding": "rte=utf-9"}, "encoding 'utf-9' is unknown: give utf-8, latin-1"),
        ({"encoding": "hex"}, "encoding 'hex' is unknown"),
        ({"text_columns": ""}, "text_columns is empty"),
    ],
)
def test_options_that_say_nothing_are_refused(fields, message):
    for config in (
        lambda: ShareConfig(tasks="reviews.csv,rte", **fields),
        lambda: TransferConfig(source="reviews.csv", target="rte", **fields),
    ):
        with pytest.raises(InputError, match=message):
            config()


def test_both_runs_offer_what_a_search_offers():
    for kind in (ShareConfig, TransferConfig):
        fields = kind.__dataclass_fields__
        assert set(OPTIONS) <= set(fields)
        assert all("TASK=VALUE" in fields[name].metadata["help"] for name in OPTIONS)
    assert SearchConfig(task="x", encoding="UTF8").encoding == "utf-8"


@pytest.mark.parametrize("given", [2.5, "2.5", [2.5], (1.0, 2.5), "balanced", 7])
def test_options_of_numbers_have_one_form_after_every_way_in(given):
    config = ShareConfig(tasks="a,b", class_weights=given)
    again = ShareConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert config.search("a").class_weights == SearchConfig(class_weights=given).class_weights
    assert config.search("a") == again.search("a")
