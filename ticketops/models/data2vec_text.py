"""Data2Vec for text: built as BERT."""

from transformers.models.data2vec import modeling_data2vec_text

from ticketops.models.bert import bert_like

DATA2VEC_TEXT = bert_like(modeling_data2vec_text, "Data2VecText")
