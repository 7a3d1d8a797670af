"""One layer: attention and feed-forward network, each added to its input and normalized."""

from torch import Tensor, nn

from lightning_dropreg.paper.models.transformer_xl.attention import RelativeAttention

__all__ = ["TransformerXLLayer"]


class TransformerXLLayer(nn.Module):
    """Relative attention, then two linear maps with a ReLU between; dropout in three places.

    Args:
        dim: Width of the hidden states, at least 1.
        heads: Number of heads, at least 1.
        head_dim: Width of each head, at least 1.
        inner_dim: Width between the two linear maps, at least 1.
        drop_prob: Probability, in ``[0, 1)``, of dropping entries of the attention's output, the feed-forward
            activation and the feed-forward output.
        attention_drop_prob: Probability, in ``[0, 1)``, of dropping attention probabilities.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, inner_dim: int, drop_prob: float, attention_drop_prob: float
    ) -> None:
        super().__init__()
        self.attention = RelativeAttention(dim, heads, head_dim, attention_drop_prob)
        self.attention_dropout = nn.Dropout(drop_prob)
        self.attention_norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, inner_dim)
        self.activation_dropout = nn.Dropout(drop_prob)
        self.down = nn.Linear(inner_dim, dim)
        self.output_dropout = nn.Dropout(drop_prob)
        self.output_norm = nn.LayerNorm(dim)

    def forward(
        self, hidden: Tensor, context: Tensor, positions: Tensor, content_bias: Tensor, position_bias: Tensor
    ) -> Tensor:
        """Compute the next layer's input; see `RelativeAttention.forward` for the arguments.

        Args:
            hidden: States of the words.
            context: States of the memory and the words.
            positions: Embedded distances.
            content_bias: ``u``.
            position_bias: ``v``.

        Returns:
            Tensor ``(batch, time, dim)``.
        """
        attended = self.attention(hidden, context, positions, content_bias, position_bias)
        hidden = self.attention_norm(hidden + self.attention_dropout(attended))
        activation = self.activation_dropout(self.up(hidden).relu())
        output: Tensor = self.output_norm(hidden + self.output_dropout(self.down(activation)))
        return output
