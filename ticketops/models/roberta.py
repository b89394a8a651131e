"""RoBERTa: built as BERT."""

from transformers.models.roberta import modeling_roberta

from ticketops.models.bert import bert_like

ROBERTA = bert_like(modeling_roberta, "Roberta")
