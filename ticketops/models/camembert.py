"""CamemBERT: built as BERT."""

from transformers.models.camembert import modeling_camembert

from ticketops.models.bert import bert_like

CAMEMBERT = bert_like(modeling_camembert, "Camembert")
