"""What vLLM's options are called here, or what takes their place, for those who come from there.

Names are those of its `SamplingParams` and `EngineArgs`, versions 0.4 to 0.11. Options that both have under one name
are not listed.
"""

from typing import Any

from minirksc.option_fields import Theirs


def _instead(advice: str, **neutral: Any) -> dict[str, Theirs]:
    """Options that there are none of here.

    Args:
        advice: What to do without them.
        neutral: Values that change nothing, by the name of the option; a tuple of several, an empty one of none.
    """
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in neutral.items()}
    return {name: Theirs(advice, several) for name, several in values.items()}


SAMPLING_NAMES = {
    **_instead("all n samples are given; use n, or a Solver to have one of many chosen", best_of=(None, 1)),
    **_instead("there is no beam search of tokens; use a Solver with depth and beam", use_beam_search=False),
    **_instead("it belongs to beam search of tokens; leave it out", length_penalty=(1, 1.0), early_stopping=False),
    **_instead("use logit_bias with a large negative bias for their token ids", bad_words=(None, [])),
    **_instead("use logit_bias, or LLM.branch and a loop of your own", logits_processors=(None, [])),
    **_instead("use LLM.score to choose among texts", allowed_token_ids=None, guided_choice=None),
    **_instead(
        "no grammar guides what is written; ask for the form in the prompt, and check what comes",
        guided_decoding=None,
        guided_json=None,
        guided_regex=None,
        guided_grammar=None,
        structured_outputs=None,
    ),
    **_instead("text is joined as the tokenizer does it; leave it out", spaces_between_special_tokens=True),
    **_instead("no prompt is cut; give one that is", truncate_prompt_tokens=None),
    **_instead("use LLM.stream for text as it comes", output_kind=()),
    **_instead("there is nothing that would read it; leave it out", extra_args=None),
}

ENGINE_NAMES = {
    "max_num_seqs": Theirs("max_batch_requests"),
    "max_num_batched_tokens": Theirs("max_batch_tokens"),
    "enable_prefix_caching": Theirs("prefix_caching"),
    "quantization": Theirs("quantize", (None,)),
    "attention_backend": Theirs("backend", (None,)),
    "kv_cache_memory_bytes": Theirs("kv_cache_bytes", (None,)),
    **_instead("use kv_cache_bytes, a size such as 2GiB", gpu_memory_utilization=(), num_gpu_blocks_override=None),
    **_instead("what loses its blocks is computed anew, and nothing is swapped; leave it out", swap_space=0),
    **_instead("weights are all on one device; quantize='int8' halves them", cpu_offload_gb=(0, 0.0)),
    **_instead("it is always on; leave it out", enable_chunked_prefill=(None, True)),
    **_instead("requests go in the order of their arrival; leave it out", scheduling_policy="fcfs"),
    **_instead(
        "an engine is one process on one device; leave it out",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        data_parallel_size=1,
        enable_expert_parallel=False,
        distributed_executor_backend=None,
        disable_custom_all_reduce=(False, True),
    ),
    **_instead("the folder's is used; leave it out", tokenizer=None, tokenizer_mode="auto", skip_tokenizer_init=False),
    **_instead("fetch it into a folder, and give that as model", revision=None, tokenizer_revision=None),
    **_instead("set HF_HOME, where huggingface_hub keeps its files", download_dir=None),
    **_instead("only safetensors are read; leave it out", load_format=("auto", "safetensors")),
    **_instead("no code of a checkpoint is ever run; leave it out", trust_remote_code=False, code_revision=None),
    **_instead("change config.json in a copy of the folder", hf_overrides=None, rope_scaling=None, rope_theta=None),
    **_instead("values of SamplingParams go before those of generation_config.json", generation_config="auto"),
    **_instead("enforce_eager=True is what there is", compilation_config=None, max_seq_len_to_capture=()),
    **_instead("nothing is speculated; leave it out", speculative_config=None, speculative_model=None),
    **_instead("merge adapters into the checkpoint", enable_lora=False, max_loras=1, max_lora_rank=()),
    **_instead("only text is read; leave it out", limit_mm_per_prompt=None),
    **_instead("nothing is logged, LLM.stats() counts; leave it out", disable_log_stats=(False, True)),
    **_instead("it always generates; leave it out", task=("auto", "generate"), runner=("auto", "generate")),
}
