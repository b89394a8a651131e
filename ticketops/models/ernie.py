"""ERNIE: built as BERT, with an embedding of the task in front."""

from transformers.models.ernie import modeling_ernie

from ticketops.models.bert import bert_like

ERNIE = bert_like(modeling_ernie, "Ernie")
