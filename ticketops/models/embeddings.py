"""What a model computes before its layers: embedding tables and their dropout, on ticketops' ops where these serve."""

from torch import Tensor, nn

from ticketops.ops.embedding import dropout, embedding, serves_embedding


class TicketEmbedding(nn.Embedding):
    """A table whose gradient costs what its rows in use cost."""

    def forward(self, input: Tensor) -> Tensor:
        """Takes ids [..], returns rows [.., C]."""
        plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        if not plain or not serves_embedding(self.weight):
            return super().forward(input)
        return embedding(self.weight, input, self.padding_idx)


class TicketDropout(nn.Dropout):
    """Dropout that draws on all threads."""

    def forward(self, input: Tensor) -> Tensor:
        """Takes and returns [.., C]."""
        if not self.training or not 0 < self.p < 1 or not serves_embedding(input):
            return super().forward(input)
        return dropout(input, self.p)


#: The stock class of a module among the embeddings, and its replacement.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.Embedding: TicketEmbedding, nn.Dropout: TicketDropout}
