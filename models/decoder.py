"""The decoder: embedding, layers, final norm and head, for every family that an `ArchSpec` describes.

Explicit from end to end: whatever a forward pass needs is an argument. Knows nothing about requests,
scheduling or the owner of the cache.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from minirksc.kernels.attention.batch import AttentionBatch
from minirksc.kernels.backend import Backend
from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.weights.linear import Linear, PlainWeight
from minirksc.models.hooks import LayerControl, MassSample
from minirksc.models.layer_inputs import LayerInputs
from minirksc.models.layers import DecoderLayer, ResidualStream, norm_weight
from minirksc.models.rope import Rotary
from minirksc.models.spec import ArchSpec, RopeSpec


@dataclass(slots=True)
class LayerFeed:
    """What the layers of a pass begin with.

    Attributes:
        hidden: `[tokens, hidden]`, the embedded tokens; becomes the residual stream.
        tables: (cos, sin), each `[tokens, 1, rotary_dim]`, by the layers' rope.
        growth: `[tokens, 1, 1]`, what queries are multiplied by; None: nothing.
        inputs: `[layers, tokens, layer_input_size]`, see `LayerInputs`; None: none.
    """

    hidden: Tensor
    tables: dict[RopeSpec, tuple[Tensor, Tensor]]
    growth: Tensor | None
    inputs: Tensor | None


class Decoder:
    """A causal language model ready to run.

    Args:
        spec: the architecture.
        weights: (name, tensor) pairs in the order of `models.weights.rules.iter_weights`: embedding, layer after
            layer, final norm, head. Each tensor is packed as soon as it arrives and then dropped.
        backend: the form of every op.

    Attributes:
        device: device of the weights.
        dtype: dtype of activations, and of the KV cache unless it is kept in another.
    """

    def __init__(self, spec: ArchSpec, weights: Iterator[tuple[str, Tensor]], backend: Backend) -> None:
        self.spec = spec
        self.backend = backend
        self._pack = backend.packer()
        self.layers: list[DecoderLayer] = []
        tied = self._add_embedding(next(weights)[1])
        top: dict[str, Tensor] = {}
        for prefix, group in groupby(weights, _layer_prefix):
            if prefix:
                self._add_layer({name.removeprefix(prefix): tensor for name, tensor in group})
            else:
                top.update(group)
        self.norm = norm_weight(spec, top["norm.weight"])
        own_head = top.get("lm_head.weight")  # a checkpoint may have one although its config ties it
        self.head = tied if own_head is None and tied is not None else Linear(top["lm_head.weight"], pack=self._pack)
        begin = "layer_inputs."
        of_inputs = {name.removeprefix(begin): tensor for name, tensor in top.items() if name.startswith(begin)}
        self.layer_inputs = None if spec.layer_input_size is None else LayerInputs(spec, of_inputs, backend, self._pack)
        # Layers that rotate alike share one table a step.
        self._rotaries = {rope: Rotary(rope, self.device) for rope in {layer.rope for layer in spec.layers} if rope}
        self._kv_sources = {layer.kv_layer for layer in spec.layers}
        self._lenses: dict[tuple[int, ...] | None, Callable[[Tensor], Tensor]] = {}
        self._embed_scale = torch.tensor(spec.embed_scale, dtype=self.dtype, device=self.device)

    def _add_embedding(self, weight: Tensor) -> Linear | None:
        """Packs `[vocab, hidden]`; gives the head if it is tied to it, which then is the only copy if it gives rows."""
        self.device, self.dtype = weight.device, weight.dtype
        tied = Linear(weight, pack=self._pack) if self.spec.tie_word_embeddings else None
        rows = None if tied is None else tied.embedder()
        self.embed = PlainWeight(weight).rows if rows is None else rows  # [tokens] int64 -> [tokens, hidden]
        return tied

    def _add_layer(self, weights: Mapping[str, Tensor]) -> None:
        spec, layer = self.spec, self.spec.layers[len(self.layers)]
        self.layers.append(DecoderLayer(spec, layer, weights, self.backend, self._pack))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the matrices that every pass reads, as they are packed; norms and the embedding's rows are few."""
        linears = [self.head, *(linear for layer in self.layers for linear in layer.linears)]
        if self.layer_inputs is not None:
            linears.append(self.layer_inputs.project)
        return sum(linear.num_bytes for linear in linears)

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        sequence_lens: Tensor,
        attention: Mapping[int | None, AttentionBatch],
        cache: Sequence[LayerCache],
        logits_rows: Tensor | None,
        control: LayerControl | None = None,
        mass: MassSample | None = None,
    ) -> Tensor:
        """Runs a flattened batch through all layers.

        Args:
            token_ids: `[tokens]` int64.
            positions: `[tokens]` int64.
            sequence_lens: `[tokens]` int64, known length of each token's sequence.
            attention: places of queries and keys, for layers of each window.
            cache: cache of each layer, written at the batch's slots.
            logits_rows: `[rows]` int64, tokens whose logits are wanted; None: all.
            control: what may take rows out between layers; their logits are not computed.
            mass: gains the attention mass of KV blocks; only where every sequence has one token.

        Returns:
            Logits `[rows, vocab]` float32.
        """
        feed = self.feed(token_ids, positions, sequence_lens)
        return self.capped(self.through_layers(feed, self._by_layer(attention), cache, logits_rows, control, mass))

    def feed(self, token_ids: Tensor, positions: Tensor, sequence_lens: Tensor) -> LayerFeed:
        """What the layers begin with; arguments as of `forward`."""
        hidden = self.embed(token_ids).to(self.dtype)  # [tokens, hidden]
        if self.spec.embed_scale != 1:
            hidden = hidden.mul_(self._embed_scale)
        tables = {rope: rotary.tables(positions, sequence_lens, self.dtype) for rope, rotary in self._rotaries.items()}
        growth = None  # [tokens, 1, 1]
        if self.spec.query_growth is not None:
            beta, length = self.spec.query_growth
            growth = (1 + beta * torch.log1p(torch.floor(positions / length))).to(self.dtype)[:, None, None]
        inputs = None if self.layer_inputs is None else self.layer_inputs(token_ids, hidden)
        return LayerFeed(hidden, tables, growth, inputs)

    def through_layers(
        self,
        feed: LayerFeed,
        attention: Sequence[AttentionBatch],
        cache: Sequence[LayerCache],
        logits_rows: Tensor | None,
        control: LayerControl | None = None,
        mass: MassSample | None = None,
    ) -> Tensor:
        """Logits `[rows, vocab]` float32 before the cap; `feed` is overwritten, and `attention` has one entry a layer.

        All other arguments as of `forward`.
        """
        tables, growth, inputs = feed.tables, feed.growth, feed.inputs
        stream = ResidualStream(feed.hidden, self.backend, self.spec.norm_eps)
        shared_kv: dict[int, Tensor] = {}  # by the layer that made it
        for index, (layer, layer_cache) in enumerate(zip(self.layers, cache, strict=True)):
            own = layer.layer
            table = None if own.rope is None else tables[own.rope]
            shared = None if own.kv_layer is None else shared_kv[own.kv_layer]
            layer_input = None if inputs is None else inputs[index]
            masses = mass.masses if mass is not None and index in mass.layers else None
            kv = layer(stream, table, growth, layer_cache, attention[index], shared, layer_input, masses)
            if index in self._kv_sources:
                shared_kv[index] = kv
            narrowed = None if control is None else control.after_layer(index, stream)
            if narrowed is not None:
                rows, logits_rows = narrowed.rows, narrowed.logits_rows
                attention = self._by_layer(narrowed.attention)
                if len(rows) == 0:
                    break
                stream.keep(rows)
                tables = {rope: (cos[rows], sin[rows]) for rope, (cos, sin) in tables.items()}
                growth = None if growth is None else growth[rows]
                inputs = None if inputs is None else inputs[:, rows]
                shared_kv = {source: kv[rows] for source, kv in shared_kv.items()}
        if logits_rows is not None:
            if len(logits_rows) == 0:
                return feed.hidden.new_empty((0, self.spec.vocab_size), dtype=torch.float32)
            stream.keep(logits_rows)
        return self.head.in_float32(stream.normed(self.norm))

    def _by_layer(self, attention: Mapping[int | None, AttentionBatch]) -> list[AttentionBatch]:
        return [attention[layer.window] for layer in self.spec.layers]

    def capped(self, logits: Tensor) -> Tensor:
        """The same under the soft cap of the architecture, if it has one; in place."""
        cap = self.spec.final_softcap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def lens(self, token_ids: Sequence[int] | None = None) -> Callable[[Tensor], Tensor]:
        """The logit lens: reads hidden states of any layer as if they were the last one's. Each is made once.

        Args:
            token_ids: tokens whose logits are read; None: all of the vocabulary.

        Returns:
            From the residual stream `[rows, hidden]` to logits `[rows, tokens]` float32: final norm, then these rows
            of the head.

        Source: nostalgebraist 2020, "interpreting GPT: the logit lens" (lesswrong.com/posts/AcKRB8wDpdaN6v6ru).
        """
        key = None if token_ids is None else tuple(token_ids)
        if key not in self._lenses:
            head = self.head if key is None else self.head.rows(key)  # copies them

            def read(hidden: Tensor) -> Tensor:
                return self.capped(head.in_float32(self.backend.rms_norm(hidden, self.norm, self.spec.norm_eps)))

            self._lenses[key] = read
        return self._lenses[key]

    @property
    def can_move_kv(self) -> bool:
        """Whether `copy_kv` can turn the keys of every layer."""
        return all(rotary.can_shift for rotary in self._rotaries.values())

    def copy_kv(
        self, index: int, layer_cache: LayerCache, sources: Tensor, destinations: Tensor, shifts: Tensor
    ) -> None:
        """Copies KV within one layer's cache, keys turned on to their new positions.

        Args:
            index: number of the layer. Where it reads another layer's cache, there is nothing to copy.
            layer_cache: cache of the layer.
            sources: slots `[tokens]` int64.
            destinations: slots `[tokens]` int64, none of which is a source.
            shifts: `[tokens]` int64, new position minus old.
        """
        layer = self.spec.layers[index]
        if layer.kv_layer is None:
            tables = None if layer.rope is None else self._rotaries[layer.rope].shift_tables(shifts)
            self.backend.copy_rotated(layer_cache, sources, destinations, tables)


def _layer_prefix(named: tuple[str, Tensor]) -> str:
    """The part "layers.3." of "layers.3.o.weight"; "" of what belongs to no layer."""
    name, _ = named
    return name[: name.index(".", len("layers.")) + 1] if name.startswith("layers.") else ""
