"""ELECTRA: built as BERT."""

from transformers.models.electra import modeling_electra

from ticketops.models.bert import bert_like

ELECTRA = bert_like(modeling_electra, "Electra")
