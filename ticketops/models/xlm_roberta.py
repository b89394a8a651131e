"""XLM-R: built as BERT."""

from transformers.models.xlm_roberta import modeling_xlm_roberta

from ticketops.models.bert import bert_like

XLM_ROBERTA = bert_like(modeling_xlm_roberta, "XLMRoberta")
