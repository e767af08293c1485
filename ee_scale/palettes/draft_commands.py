"""How engines run a drafter beside its target: the one place for their commands, and what those were checked with."""

import json
import shlex
from dataclasses import dataclass

GPU = "needs a GPU, so nobody has run it here; the command is the one of"


@dataclass(frozen=True)
class Drafted:
    """A target with its drafter, by their folders, and how many tokens are drafted per cycle.

    sampled: transformers' call samples; the servers leave that to each request.
    """

    target: str
    drafter: str
    drafts: int
    sampled: bool = False


def transformers_code(pair: Drafted) -> str:
    """Python that runs a pair on stock transformers, which takes one text at a time."""
    target, drafter = json.dumps(pair.target), json.dumps(pair.drafter)
    chosen = "do_sample=True, top_k=0" if pair.sampled else "do_sample=False"
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({target})
model = AutoModelForCausalLM.from_pretrained({target}, dtype="auto")
drafter = AutoModelForCausalLM.from_pretrained({drafter}, dtype="auto")
drafter.generation_config.update(num_assistant_tokens={pair.drafts}, num_assistant_tokens_schedule="constant")
drafter.generation_config.update(assistant_confidence_threshold=0)  # or it stops where it is not sure
prompt = tokenizer("Once upon a time", return_tensors="pt")
output = model.generate(**prompt, assistant_model=drafter, {chosen}, max_new_tokens=64)
print(tokenizer.decode(output[0]))"""


def llama_cpp_command(pair: Drafted) -> str:
    """Both as GGUF files, and llama.cpp's server."""
    return "\n".join(
        [
            f"ee-scale export format=gguf {shlex.quote(f'src={pair.target}')} out=target.gguf",
            f"ee-scale export format=gguf {shlex.quote(f'src={pair.drafter}')} out=drafter.gguf",
            f"llama-server -m target.gguf -md drafter.gguf --spec-type draft-simple --spec-draft-n-max {pair.drafts}",
        ]
    )


def vllm_command(pair: Drafted) -> str:
    """vLLM's server."""
    config = {"method": "draft_model", "model": pair.drafter, "num_speculative_tokens": pair.drafts}
    return f"vllm serve {shlex.quote(pair.target)} --speculative-config {shlex.quote(json.dumps(config))}"


def sglang_command(pair: Drafted) -> str:
    """SGLang's server. It counts the target's own token among those of a cycle."""
    return (
        f"python -m sglang.launch_server --model-path {shlex.quote(pair.target)} --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path {shlex.quote(pair.drafter)} --speculative-num-steps {pair.drafts} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {pair.drafts + 1}"
    )


def tensorrt_llm_code(pair: Drafted) -> str:
    """Python for TensorRT-LLM."""
    return f"""\
from tensorrt_llm import LLM
from tensorrt_llm.llmapi import DraftTargetDecodingConfig

drafting = DraftTargetDecodingConfig(max_draft_len={pair.drafts}, speculative_model={json.dumps(pair.drafter)})
llm = LLM({json.dumps(pair.target)}, speculative_config=drafting, disable_overlap_scheduler=True)
print(llm.generate("Once upon a time").outputs[0].text)"""


def engine_sections(pair: Drafted) -> list[str]:
    """Markdown paragraphs: each engine, what its command was checked against, and the command."""
    return [
        "**transformers**: the suite runs it with 5.24; greedy text is the target's alone.",
        f"```python\n{transformers_code(pair)}\n```",
        "**llama.cpp**: the suite runs build 11549 (wheel xllamacpp) so; greedy tokens are the target's alone.",
        f"```bash\n{llama_cpp_command(pair)}\n```",
        f"**vLLM**: {GPU} 0.26's documentation.",
        f"```bash\n{vllm_command(pair)}\n```",
        f"**SGLang**: {GPU} its documentation of November 2026.",
        f"```bash\n{sglang_command(pair)}\n```",
        f"**TensorRT-LLM**: {GPU} 1.4.0rc1's documentation.",
        f"```python\n{tensorrt_llm_code(pair)}\n```",
    ]
