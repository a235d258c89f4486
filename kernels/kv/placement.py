"""How a layer norms its new heads, and where a step puts them: what all forms of `kv_store` are called with."""

from typing import NamedTuple

from torch import Tensor

from minirksc.kernels.kv.layer_cache import LayerCache
from minirksc.kernels.rope import RopeTables


class HeadNorms(NamedTuple):
    """Norms of a layer's heads, see `rms_norm`; made once, at load.

    Attributes:
        num_heads: number of query heads.
        q_norm: `[head_dim]`, weight of the norm of q; None for no norm.
        k_norm: `[head_dim]`, weight of the norm of k; None for no norm.
        v_norm: whether v is normed, which takes no weight.
        eps: number added to the mean squares.
    """

    num_heads: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    v_norm: bool
    eps: float


class Placement(NamedTuple):
    """Where the tokens of a step stand in their sequences, and where a layer's keys and values of them go.

    Attributes:
        rope: (cos, sin) of `rope_tables`, `[tokens, 1, rotary_dim]` each; None for no rotation.
        query_growth: `[tokens, 1, 1]`, multiplied to q after the rotation; None for none.
        cache: cache of the layer, written at the slots; None where keys and values are another layer's.
        slots: `[tokens]` int64 or int32, distinct; -1: the token is not stored.
    """

    rope: RopeTables | None
    query_growth: Tensor | None
    cache: LayerCache | None
    slots: Tensor
