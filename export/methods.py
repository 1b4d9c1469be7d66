"""The embedding lookup as a method of its own, and no more of the network than its table."""

from torch import Tensor, nn

from tokenloop.models.decoder import Backbone


class Embed(nn.Module):
    """token int64 [B, 1] -> hidden [B, 1, D], what decode_embedded takes of it."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.embed_tokens, self.embed = backbone.embed_tokens, backbone.embed

    def forward(self, token: Tensor) -> Tensor:
        return self.embed(token)
