"""Why models differ: for every field of a spec its formula, what it is good for, and who proposed it.

Data for people. Nothing that is computed depends on it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """About one field.

    Attributes:
        title: name of the field in a few words.
        text: formula and purpose, in a sentence or two.
        source: paper or file that describes it; "" for none.
    """

    title: str
    text: str
    source: str = ""


VASWANI = "Vaswani et al. 2017, arXiv 1706.03762"
GEMMA = "Gemma Team 2024, arXiv 2403.08295"
GEMMA2 = "Gemma Team 2024, arXiv 2408.00118"
GEMMA_CODE, GEMMA4 = "transformers' modeling_gemma.py", "transformers' modeling_gemma4.py"
QWEN = "Bai et al. 2023, arXiv 2309.16609"
ROFORMER = "Su et al. 2021, arXiv 2104.09864"
RMS_NORM = "Zhang and Sennrich 2019, arXiv 1910.07467"

WHY: dict[str, Reason] = {
    # Sizes
    "model_type": Reason("model type", "config.json's name for the family; it decides which fields are read and how."),
    "num_layers": Reason(
        "layers", "Each is attention and then an MLP; depth costs parameters and time alike.", VASWANI
    ),
    "hidden_size": Reason("hidden size", "Width of the residual stream, which every layer reads and adds to.", VASWANI),
    "vocab_size": Reason(
        "vocabulary", "Rows of the embedding and of the head. A larger one makes text shorter and the two bigger."
    ),
    "num_heads": Reason(
        "query heads", "Attention runs in so many heads side by side, each with its own pattern of looking.", VASWANI
    ),
    "intermediate_size": Reason(
        "MLP width",
        "down(act(gate(x)) * up(x)) widens to it and comes back; most parameters of a layer are here.",
        "Shazeer 2020, arXiv 2002.05202",
    ),
    "max_position_embeddings": Reason(
        "longest sequence", "Positions that the model was trained for, or that its rotations were stretched to."
    ),
    "eos_token_ids": Reason("end tokens", "A generation ends with any of them."),
    "bos_token_id": Reason("begin token", "Put before a prompt; models that were trained with it are lost without."),
    # Attention
    "num_kv_heads": Reason(
        "KV heads",
        "num_heads / num_kv_heads query heads share one key and value head, so the KV cache, and what a step reads "
        "of it, shrinks by that factor at little loss.",
        "Ainslie et al. 2023, arXiv 2305.13245 (groups); Shazeer 2019, arXiv 1911.02150 (one head)",
    ),
    "head_dim": Reason(
        "head_dim",
        "Width of a head, where it is not hidden_size / num_heads: attention gets a width of its own, and q and o "
        "become rectangular.",
        GEMMA,
    ),
    "window": Reason(
        "window",
        "A query sees the latest W keys, its own included: key j is visible from position i if j > i - W. Time and "
        "cache stop growing with the length; what is further back still arrives through the layers above, W further "
        "each, and through layers without a window where there are some.",
        "Beltagy et al. 2020, arXiv 2004.05150; Jiang et al. 2023, arXiv 2310.06825; mixed layers: " + GEMMA2,
    ),
    "query_scale": Reason(
        "query scale",
        "Multiplied to q.k before the softmax. The usual head_dim^-0.5 keeps the variance of scores at 1 whatever the "
        "width; some take hidden_size / num_heads for head_dim, and 1 will do where q and k are normed.",
        f"{VASWANI}, section 3.2.1; transformers' modeling_gemma2.py",
    ),
    "query_growth": Reason(
        "queries grow with the position",
        "q at position p times 1 + beta * ln(1 + floor(p / length)). A softmax over more keys is flatter; larger "
        "queries sharpen it again on long text, and change nothing within the first `length` positions.",
        "Nakanishi 2025, arXiv 2501.19399 (the idea)",
    ),
    "attn_softcap": Reason(
        "soft cap on scores",
        "c * tanh(score / c) before the mask and the softmax. Keeps scores within -c..c, so that none runs away in "
        "training; small ones hardly change.",
        "Bello et al. 2016, arXiv 1611.09940; " + GEMMA2,
    ),
    "qkv_bias": Reason(
        "biases on q, k and v",
        "W x + b in place of W x: a head can prefer some keys whatever the token is. Said to help on sequences longer "
        "than those of the training.",
        QWEN,
    ),
    "o_bias": Reason("bias on o", "W x + b for attention's output; biases elsewhere come with it in some files."),
    "qk_norm": Reason(
        "norms on q and k",
        "RMSNorm over each head's query and key before they are rotated. Scores are bounded by the norms' weights, so "
        "that training stays stable in low precision.",
        "Henry et al. 2020, arXiv 2010.04245; Dehghani et al. 2023, arXiv 2302.05442",
    ),
    "v_norm": Reason(
        "norm on v", "RMSNorm without a weight over each head's value: all values enter the sum at one scale.", GEMMA4
    ),
    "value_is_key": Reason(
        "values are keys",
        "The value is what the key projection gives, before norm and rotation: one projection less. Keys are cached "
        "rotated, so the cache still holds both.",
        GEMMA4,
    ),
    "kv_layer": Reason(
        "keys and values of an earlier layer",
        "The layer has queries only and reads what another one of its kind has cached: no k and v to compute or keep.",
        "Brandon et al. 2024, arXiv 2405.12981",
    ),
    # Positions
    "rope": Reason(
        "positions",
        "Without RoPE the causal mask alone tells order. Such layers see all distances alike, which carries over to "
        "lengths never trained on; their neighbours keep the sense of place.",
        "Kazemnejad et al. 2023, arXiv 2305.19466; Yang et al. 2025, arXiv 2501.18795",
    ),
    "rope.kind": Reason(
        "RoPE kind", "How fast each pair of elements of a query or key turns with the position.", ROFORMER
    ),
    "rope.theta": Reason(
        "RoPE theta",
        "Pair i turns by theta^(-2i/d) radians a position. The slowest pair tells positions apart over about "
        "2 pi theta of them: long contexts want a larger base, narrow windows can do with a small one.",
        ROFORMER + "; Xiong et al. 2023, arXiv 2309.16039",
    ),
    "rope.rotary_dim": Reason(
        "rotated part of a head",
        "Only the first elements of each query and key turn; the rest match by content alone, whatever the distance.",
        "Black et al. 2022, arXiv 2204.06745",
    ),
    "rope.parameters": Reason("RoPE parameters", "Numbers in the formula of the RoPE kind.", "models/rope.py"),
    "rope.attention_factor": Reason(
        "RoPE attention factor",
        "Multiplied into cosines and sines, so that scores grow by its square: stretched rotations make the softmax "
        "flatter, this sharpens it again. What a file calls attn_factor is one more factor of YaRN's.",
        "Peng et al. 2023, arXiv 2309.00071",
    ),
    # Norms
    "norm_eps": Reason(
        "norm epsilon",
        "x / sqrt(mean(x^2) + eps) * w: keeps the root away from 0; a larger one is safer in 16 bits.",
        RMS_NORM,
    ),
    "norm_offset": Reason(
        "norm weight offset",
        "Norms multiply by 1 + w in place of w: a weight of 0 changes nothing, so weight decay pulls towards that, "
        "and 16-bit numbers are finest around it.",
        GEMMA_CODE,
    ),
    "norm_in_float32": Reason(
        "norm weights in float32",
        "The weight is applied before the cast back to 16 bits, not after it: one rounding in place of two.",
        GEMMA_CODE,
    ),
    "sandwich_norms": Reason(
        "norms after the branches too",
        "x + norm(f(norm(x))): what attention and MLP add is normed as well, so that no layer can swamp the stream.",
        "Ding et al. 2021, arXiv 2105.13290; " + GEMMA2,
    ),
    "layer_input_size": Reason(
        "inputs a layer",
        "Each layer gets a small vector of every token of its own, from a second embedding and from the first one: "
        "parameters that cost memory, which may be slow memory, and hardly any time.",
        GEMMA4,
    ),
    "layer_scale": Reason(
        "a scale for each layer",
        "The stream is multiplied by a learned number after each layer: depth can be weighed without touching norms.",
        GEMMA4,
    ),
    # MLP
    "activation": Reason(
        "activation",
        "down(act(gate(x)) * up(x)). silu is x * sigmoid(x); gelu is x * Phi(x), gelu_tanh a close form of it. They "
        "behave much alike; what matters is to use the one of the training.",
        "Shazeer 2020, arXiv 2002.05202; Hendrycks and Gimpel 2016, arXiv 1606.08415",
    ),
    "mlp_bias": Reason("biases in the MLP", "W x + b for gate, up and down; most families found them to be of no use."),
    # Embedding and head
    "embed_scale": Reason(
        "scaled embeddings",
        "Embeddings times sqrt(hidden_size), rounded to the model's dtype: with a tied head they are small, and enter "
        "the stream at the size of what the layers add.",
        f"{VASWANI}, section 3.4; {GEMMA_CODE}",
    ),
    "tie_word_embeddings": Reason(
        "tied head",
        "The head is the embedding: logits are products with the tokens' own vectors. Saves vocab x hidden parameters, "
        "which for a small model is a large part.",
        "Press and Wolf 2016, arXiv 1608.05859",
    ),
    "final_softcap": Reason(
        "soft cap on logits",
        "c * tanh(logit / c): bounds how sure the model can be. Keeps their order, so greedy text is the same without.",
        GEMMA2,
    ),
    # The checkpoint's layout; changes nothing that is computed
    "layout.fused_qkv": Reason("fused q, k, v in the file", "One tensor in place of three. Same mathematics."),
    "layout.fused_gate_up": Reason("fused gate, up in the file", "One tensor in place of two. Same mathematics."),
    "layout.mlp_norm": Reason(
        "name of the MLP's norm",
        "Where there are norms after the branches, post_attention_layernorm is one of those. Same mathematics.",
    ),
    "layout.is_wrapped": Reason(
        "part of a multimodal checkpoint",
        "The text model sits inside a larger one; the tensors for images or sound are skipped, and so is their input.",
    ),
    "layout.fp8": Reason(
        "FP8 weights in the file",
        "Half the bytes to store: eight bits a number, and scales. They are widened as they are read, each rounded "
        "once; activations are not rounded to FP8.",
        "DeepSeek-V3, arXiv 2412.19437",
    ),
}
"""Every field of `ArchSpec`, and of the specs in it, in the order in which a page shows them."""

ROPE_KINDS: dict[str, Reason] = {
    "default": Reason("plain RoPE", "Pair i turns by theta^(-2i/d) radians a position.", ROFORMER),
    "linear": Reason(
        "linear RoPE",
        "All pairs turn `factor` times slower, as if positions were squeezed: a longer text falls within the angles "
        "of the training. Near tokens become harder to tell apart.",
        "Chen et al. 2023, arXiv 2306.15595",
    ),
    "dynamic": Reason(
        "dynamic RoPE",
        "Nothing changes up to the original length; beyond it theta grows with the position, so that short text is "
        "as before and long text still makes sense without training.",
        "Peng et al. 2023, arXiv 2309.00071",
    ),
    "yarn": Reason(
        "YaRN",
        "Pairs that turn often within the original length stay, since they tell near tokens apart; slow ones turn "
        "`factor` times slower; those between are interpolated. Reaches far with little training.",
        "Peng et al. 2023, arXiv 2309.00071",
    ),
    "llama3": Reason(
        "Llama 3 RoPE",
        "As YaRN by bands of wavelengths: short ones stay, long ones are stretched by `factor`, between the two a "
        "blend.",
        "Grattafiori et al. 2024, arXiv 2407.21783, and the Llama 3.1 model card's code",
    ),
    "longrope": Reason(
        "LongRoPE",
        "Each pair has a factor of its own, found by search: one list up to the original length, another for all "
        "positions of a longer sequence.",
        "Ding et al. 2024, arXiv 2402.13753",
    ),
    "proportional": Reason(
        "proportional RoPE",
        "Only the first pairs turn, at the speeds that they would have if all did; the others stand still and match "
        "by content.",
        GEMMA4,
    ),
}
"""Every kind of `RopeSpec`."""
