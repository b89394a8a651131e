"""Measures a fine-tuning step of encoders of base size other than BERT against transformers, and DeBERTa-v3 against
flash-deberta where that is installed, with random weights and sequence lengths as in RTE."""

from collections.abc import Callable
from importlib.util import find_spec

from bench.gpu import step
from bench.gpu.measure import Row, Setting, measured
from bench.gpu.workloads import Workload, task_lengths
from bench.step import BASE_SIZED
from ticketops import patch


def rows(setting: Setting) -> list[Row]:
    """Measures one batch of each encoder with every contender.

    Returns:
        The rows.
    """
    table = []
    lengths = (5, 2) if setting.tiny else task_lengths("rte", 32)
    for name in (name for name in BASE_SIZED if name != "bert-base"):
        work = Workload(f"{name}, rte, batch {len(lengths)}", lengths)
        batch = step.make_batch(work, setting)
        verdict = step.check(batch, setting, name)

        def ours(name: str = name, batch: step.Batch = batch, recording: bool = True) -> Callable[[], object]:
            model = step.make_model(setting, name).train()
            handle = patch(model)
            plain = step.make_step(model, model, batch, setting)
            return step.recorded(handle, plain) if recording else plain

        def stock(name: str = name, batch: step.Batch = batch, kind: type | None = None) -> Callable[[], object]:
            model = step.make_model(setting, name, kind).train()
            return step.make_step(model, model, batch, setting)

        def flash(stock: Callable[..., Callable[[], object]] = stock) -> Callable[[], object]:
            from flashdeberta import FlashDebertaV2ForSequenceClassification

            return stock(kind=FlashDebertaV2ForSequenceClassification)

        contenders: dict[str, Callable[[], Callable[[], object]]] = {
            "ticketops": ours,
            "ticketops without importance": lambda ours=ours: ours(recording=False),
            "transformers": stock,
        }
        if "deberta" in name and not setting.tiny and find_spec("flashdeberta"):
            contenders["flash-deberta"] = flash
        for contender, build in contenders.items():
            row = {"bench": "encoders", "workload": work.name, "tokens": work.tokens, "pass": "step"}
            table.append(measured({**row, "contender": contender, "gate": verdict}, build, None, setting))
    return table
