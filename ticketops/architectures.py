"""The architectures that ticketops serves, by name: reading this table imports neither torch nor transformers."""

from typing import NamedTuple


class Architecture(NamedTuple):
    """One architecture of transformers.

    Attributes:
        package: its folder in `transformers.models`.
        prefix: what its class names begin with.
        family: the module of `ticketops.models` that makes its adapter.
        stack: its class that holds the list of layers; shrunk models are narrowed where this is made.
        suffix: of its modeling file, where the folder has several.
        extra_tokens: in front of an image's patches.
        gated: True if its FFNs have a gate.
        since: version of transformers from which on it is served; empty if from the oldest supported one on.
    """

    package: str
    prefix: str
    family: str
    stack: str
    suffix: str = ""
    extra_tokens: int = 0
    gated: bool = False
    since: str = ""

    @property
    def module(self) -> str:
        """The full name of its modeling module."""
        return f"transformers.models.{self.package}.modeling_{self.package}{self.suffix}"


def _bert(package: str, prefix: str, suffix: str = "") -> Architecture:
    return Architecture(package, prefix, "bert", f"{prefix}Encoder", suffix)


ARCHITECTURES = (
    _bert("bert", "Bert"),
    _bert("camembert", "Camembert"),
    _bert("data2vec", "Data2VecText", "_text"),
    Architecture("deberta_v2", "DebertaV2", "deberta", "DebertaV2Encoder"),
    Architecture("deit", "DeiT", "vit", "DeiTModel", extra_tokens=2),
    Architecture("distilbert", "DistilBert", "distilbert", "Transformer"),
    _bert("electra", "Electra"),
    _bert("ernie", "Ernie"),
    Architecture("eurobert", "EuroBert", "eurobert", "EuroBertModel", gated=True),
    Architecture("gte", "Gte", "rotary", "GteModel", gated=True, since="5.18"),
    Architecture("jina_embeddings_v3", "JinaEmbeddingsV3", "rotary", "JinaEmbeddingsV3Model"),
    Architecture("modernbert", "ModernBert", "modernbert", "ModernBertModel", gated=True),
    Architecture("mpnet", "MPNet", "mpnet", "MPNetEncoder"),
    Architecture("nomic_bert", "NomicBert", "rotary", "NomicBertModel", gated=True, since="5.24"),
    _bert("roberta", "Roberta"),
    Architecture("vit", "ViT", "vit", "ViTModel", extra_tokens=1),
    _bert("xlm_roberta", "XLMRoberta"),
    Architecture("xlm_roberta_xl", "XLMRobertaXL", "xlm_roberta_xl", "XLMRobertaXLEncoder"),
)
