"""What a model computes before its layers: embedding tables and their dropout, on ticketops' ops where these serve."""

from torch import Tensor, nn

from ticketops.ops.embedding import dropout, embedding, layer_norm, serves_embedding


class TicketEmbedding(nn.Embedding):
    """A table whose gradient costs what its rows in use cost."""

    def forward(self, input: Tensor) -> Tensor:
        """Takes ids [..], returns rows [.., C]."""
        plain = self.max_norm is None and not self.scale_grad_by_freq and not self.sparse
        if not plain or not serves_embedding(self.weight):
            return super().forward(input)
        return embedding(self.weight, input, self.padding_idx)


class TicketLayerNorm(nn.LayerNorm):
    """LayerNorm whose results lie in kept memory."""

    def forward(self, input: Tensor) -> Tensor:
        """Takes and returns [.., C]."""
        plain = self.elementwise_affine and self.bias is not None and len(self.normalized_shape) == 1
        if not plain or input.dtype != self.weight.dtype or not serves_embedding(input):
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, self.eps)


class TicketDropout(nn.Dropout):
    """Dropout that draws on all threads."""

    def forward(self, input: Tensor) -> Tensor:
        """Takes and returns [.., C]."""
        if not self.training or not 0 < self.p < 1 or not serves_embedding(input):
            return super().forward(input)
        return dropout(input, self.p)


#: The stock class of a module among the embeddings, and its replacement.
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Embedding: TicketEmbedding,
    nn.LayerNorm: TicketLayerNorm,
    nn.Dropout: TicketDropout,
}
