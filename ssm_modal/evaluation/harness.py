"""EleutherAI's lm-evaluation-harness on the models here; needs the extra "eval".

The class is handed to the harness as an object: the harness loads none from outside by name.
"""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from ssm_modal.evaluation.likelihood import score_rows
from ssm_modal.generation import GenerationConfig, generate
from ssm_modal.models import CausalLM
from ssm_modal.tokenizers import TextTokenizer

try:
    from lm_eval.api.model import TemplateLM
except ImportError as error:
    raise ImportError(
        "the evaluation harness needs lm-eval, which is not installed; install it with: "
        "pip install 'ssm-modal[eval]'"
    ) from error


class HarnessModel(TemplateLM):
    """A `CausalLM` as lm-evaluation-harness asks for one: `lm_eval.simple_evaluate(model=HarnessModel(...))`.

    batch_size: rows that are read or generated together. segment: tokens that go through the model at once:
    inputs of any length are streamed, none is cut. max_gen_toks: new tokens of a request that names no limit.
    """

    backend = "causal"

    def __init__(
        self,
        model: CausalLM,
        tokenizer: TextTokenizer,
        *,
        batch_size: int = 16,
        segment: int = 8192,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected 1 or more")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.segment, self.max_gen_toks = batch_size, segment, max_gen_toks

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; stands before the first token of a text too, where no context does."""
        if self.tokenizer.eos_id is None:
            raise ValueError(
                "the tokenizer has no end-of-text token, which the harness puts before a text without context"
            )
        return self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint()[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of `string`, no special ids added."""
        return self.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows = [context + continuation for _, context, continuation in requests]
        starts = [len(context) for _, context, _ in requests]
        out = []
        for found in self._scored(rows, starts, disable_tqdm):
            out.append((float(found.logprobs.double().sum()), bool(found.greedy.all())))
        for request, answer in zip(requests, out):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return out

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, each token given all before it, the first given the
        end-of-text token; no windows, whatever the length."""
        rows = [[self.prefix_token_id, *self.tok_encode(request.args[0])] for request in requests]
        found = self._scored(rows, [1] * len(rows), disable_tqdm)
        return [float(f.logprobs.double().sum()) for f in found]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy, or sampled where a request says `do_sample`, up to the first of its `until` texts."""
        texts: list[str] = [""] * len(requests)
        groups: dict[GenerationConfig, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(self._settings(dict(request.args[1])), []).append(i)
        with tqdm(total=len(requests), desc="Generating", disable=disable_tqdm) as bar:
            for config, members in groups.items():
                for start in range(0, len(members), self.batch_size):
                    own = members[start : start + self.batch_size]
                    prompts = [self.tok_encode(requests[i].args[0]) or [self.prefix_token_id] for i in own]
                    result = generate(self.model, prompts, config, tokenizer=self.tokenizer)
                    for i, text in zip(own, result.texts or []):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(own))
        return texts

    def _settings(self, asked: dict[str, Any]) -> GenerationConfig:
        until = asked.pop("until", None) or []
        limit = asked.pop("max_gen_toks", asked.pop("max_new_tokens", self.max_gen_toks))
        temperature = float(asked.pop("temperature", 0.0))
        sample = asked.pop("do_sample", temperature > 0)
        top_k, top_p = asked.pop("top_k", None), asked.pop("top_p", 1.0)
        if asked:
            raise ValueError(f"the task's generation_kwargs hold {', '.join(sorted(asked))}, unknown here")
        return GenerationConfig(
            max_new_tokens=int(limit),
            temperature=(temperature or 1.0) if sample else 0.0,
            top_k=top_k,
            top_p=top_p,
            stop=(until,) if isinstance(until, str) else tuple(until),
            seed=0,
            prefill_tokens=self.segment,
        )

    def _scored(self, rows: list[list[int]], starts: list[int], quiet: bool) -> list[Any]:
        # Rows of like length together, the longest first: too little memory shows at once.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: list[Any] = [None] * len(rows)
        with tqdm(total=len(rows), desc="Reading", disable=quiet) as bar:
            for at in range(0, len(order), self.batch_size):
                own = order[at : at + self.batch_size]
                scored = score_rows(
                    self.model, [rows[i] for i in own], [starts[i] for i in own], segment=self.segment
                )
                for i, one in zip(own, scored):
                    found[i] = one
                bar.update(len(own))
        return found
