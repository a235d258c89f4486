"""What vLLM's options are called here, or what takes their place, for those who come from there.

Names are those of its `SamplingParams` and `EngineArgs`, versions 0.4 to 0.11. Options that both have under one name
are not listed.
"""

from minirksc.option_fields import Theirs

_ONE_PROCESS = "an engine is one process on one device; leave it out"
_NO_ADAPTERS = "no adapters are loaded; merge them into the checkpoint"
_NO_GRAMMARS = "no grammar guides the sampling; say it in the prompt, and check what comes"
_NO_DRAFTS = "nothing is speculated; leave it out"
_FROM_FOLDER = "a checkpoint is read as its folder has it; give that folder as model"
_OWN_CODE = "no code of a checkpoint is ever run; leave it out"
_NO_IMAGES = "only text is read; leave it out"
_ALWAYS_ON = "it is always on, and needs no option; leave it out"
_NOT_HERE = "there is no such thing here; leave it out"

SAMPLING_NAMES = {
    "best_of": Theirs("all n samples are given; use n, or a Solver to have one of many chosen", (None, 1)),
    "use_beam_search": Theirs("there is no beam search of tokens; use a Solver with depth and beam", (False,)),
    "length_penalty": Theirs("it belongs to beam search of tokens, which there is none of; leave it out", (1, 1.0)),
    "early_stopping": Theirs("it belongs to beam search of tokens, which there is none of; leave it out", (False,)),
    "bad_words": Theirs("use logit_bias with a large negative bias for their token ids", (None, [], ())),
    "allowed_token_ids": Theirs("use LLM.score to choose among given continuations", (None,)),
    "logits_processors": Theirs("use logit_bias, or LLM.branch and a loop of your own", (None, [], ())),
    "spaces_between_special_tokens": Theirs("text is joined as the tokenizer does it; leave it out", (True,)),
    "truncate_prompt_tokens": Theirs("no prompt is cut; give token ids that are", (None,)),
    "guided_decoding": Theirs(_NO_GRAMMARS, (None,)),
    "structured_outputs": Theirs(_NO_GRAMMARS, (None,)),
    "guided_json": Theirs(_NO_GRAMMARS, (None,)),
    "guided_regex": Theirs(_NO_GRAMMARS, (None,)),
    "guided_choice": Theirs("use LLM.score to choose among given continuations", (None,)),
    "guided_grammar": Theirs(_NO_GRAMMARS, (None,)),
    "output_kind": Theirs("use LLM.stream for text as it comes"),
    "extra_args": Theirs(_NOT_HERE, (None,)),
}

ENGINE_NAMES = {
    "max_num_seqs": Theirs("max_batch_requests"),
    "max_num_batched_tokens": Theirs("max_batch_tokens"),
    "enable_prefix_caching": Theirs("prefix_caching"),
    "quantization": Theirs("quantize", (None,)),
    "attention_backend": Theirs("backend", (None,)),
    "gpu_memory_utilization": Theirs("use kv_cache_bytes, a size and not a share of the memory"),
    "kv_cache_memory_bytes": Theirs("kv_cache_bytes", (None,)),
    "num_gpu_blocks_override": Theirs("use kv_cache_bytes, which is counted in bytes", (None,)),
    "swap_space": Theirs("what loses its blocks is computed anew, and nothing is swapped; leave it out", (0,)),
    "cpu_offload_gb": Theirs("weights are on one device; use quantize='int8' to halve them", (0, 0.0)),
    "enable_chunked_prefill": Theirs(_ALWAYS_ON, (None, True)),
    "scheduling_policy": Theirs("requests go by their order; leave it out", ("fcfs",)),
    "tensor_parallel_size": Theirs(_ONE_PROCESS, (1,)),
    "pipeline_parallel_size": Theirs(_ONE_PROCESS, (1,)),
    "data_parallel_size": Theirs(_ONE_PROCESS, (1,)),
    "enable_expert_parallel": Theirs(_ONE_PROCESS, (False,)),
    "distributed_executor_backend": Theirs(_ONE_PROCESS, (None,)),
    "disable_custom_all_reduce": Theirs(_ONE_PROCESS, (False, True)),
    "tokenizer": Theirs(_FROM_FOLDER, (None,)),
    "tokenizer_mode": Theirs(_FROM_FOLDER, ("auto",)),
    "skip_tokenizer_init": Theirs(_FROM_FOLDER, (False,)),
    "download_dir": Theirs("set HF_HOME, which says where huggingface_hub keeps its files", (None,)),
    "load_format": Theirs("only safetensors are read; leave it out", ("auto", "safetensors")),
    "revision": Theirs("fetch that revision into a folder and give it as model", (None,)),
    "tokenizer_revision": Theirs("fetch that revision into a folder and give it as model", (None,)),
    "code_revision": Theirs(_OWN_CODE, (None,)),
    "trust_remote_code": Theirs(_OWN_CODE, (False,)),
    "hf_overrides": Theirs("change config.json in a copy of the folder", (None,)),
    "rope_scaling": Theirs("change config.json in a copy of the folder", (None,)),
    "rope_theta": Theirs("change config.json in a copy of the folder", (None,)),
    "generation_config": Theirs("values of SamplingParams go before those of generation_config.json", ("auto",)),
    "max_seq_len_to_capture": Theirs("steps of any length are recorded; enforce_eager=True turns that off"),
    "compilation_config": Theirs("steps are recorded as they are; enforce_eager=True turns that off", (None,)),
    "speculative_config": Theirs(_NO_DRAFTS, (None,)),
    "speculative_model": Theirs(_NO_DRAFTS, (None,)),
    "num_speculative_tokens": Theirs(_NO_DRAFTS, (None,)),
    "enable_lora": Theirs(_NO_ADAPTERS, (False,)),
    "max_loras": Theirs(_NO_ADAPTERS, (1,)),
    "max_lora_rank": Theirs(_NO_ADAPTERS),
    "limit_mm_per_prompt": Theirs(_NO_IMAGES, (None,)),
    "max_logprobs": Theirs("at most 100 may be asked for; leave it out"),
    "disable_log_stats": Theirs("nothing is logged; LLM.stats() has the counters", (False, True)),
    "task": Theirs("it always generates; leave it out", ("auto", "generate")),
    "runner": Theirs("it always generates; leave it out", ("auto", "generate")),
    "served_model_name": Theirs("there is no server; leave it out", (None,)),
}
