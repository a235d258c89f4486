"""Embeddings a layer: besides the stream, each layer gets a small vector of every token, made for it alone.

For layer l and token t: (norm(P x_t)_l + sqrt(size) E_t,l) / sqrt(2), where x_t is the token's scaled embedding, P a
projection to all layers at once, divided by sqrt(hidden), and E a second embedding. `DecoderLayer` gates it by the
stream. The second embedding is large, but only the rows of the tokens at hand are read.

Source: transformers' modeling_gemma4.py.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from minirksc.kernels.backend import Backend
from minirksc.kernels.weights.linear import Linear, Pack
from minirksc.models.layers import norm_weight
from minirksc.models.spec import ArchSpec


class LayerInputs:
    """Weights of the inputs of all layers.

    Args:
        spec: sizes; layer_input_size is not None.
        weights: parameters by their names below `layer_inputs.`; see `models/weights/rules.py`.
        backend: the form of every op.
        pack: makes the form of a weight.
    """

    def __init__(self, spec: ArchSpec, weights: Mapping[str, Tensor], backend: Backend, pack: Pack) -> None:
        assert spec.layer_input_size is not None
        self.spec = spec
        self.backend = backend
        self.embed = weights["embed.weight"]  # [vocab, layers * size]
        self.project = Linear(weights["project.weight"], pack=pack)
        self.norm = norm_weight(spec, weights["norm.weight"])
        self._embed_scale = torch.tensor(spec.layer_input_size**0.5, dtype=self.embed.dtype, device=self.embed.device)

    def __call__(self, token_ids: Tensor, hidden: Tensor) -> Tensor:
        """Computes them.

        Args:
            token_ids: `[tokens]` int64.
            hidden: `[tokens, hidden]`, scaled embeddings.

        Returns:
            `[layers, tokens, size]`.
        """
        shape = (len(token_ids), self.spec.num_layers, -1)
        embedded = F.embedding(token_ids, self.embed).mul_(self._embed_scale).view(shape)  # [tokens, layers, size]
        projected = self.project(hidden).mul_(self.spec.hidden_size**-0.5).view(shape)
        normed = self.backend.rms_norm(projected, self.norm, self.spec.norm_eps)
        return normed.add_(embedded).mul_(2**-0.5).transpose(0, 1)
