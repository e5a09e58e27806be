"""The model `memformer` of lm-evaluation-harness: texts of any length are streamed, so no context is ever cut."""

import copy
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from memformer.data.outside_tokenizers import encode_after
from memformer.errors import InputError, InputTypeError
from memformer.generation.session import Session
from memformer.lm_eval.generating import check_generation, generate
from memformer.lm_eval.scoring import Ids, nats_and_greedy, nats_of
from memformer.training.run_folder import load_run, use_float32_on_cpu
from memformer.utils.checks import Integer, check_choice, check_integer, refuse_unknown_keys, utf_8_of
from memformer.utils.machine import choose_device
from memformer.utils.progress import print_warning

Item = TypeVar("Item")
Result = TypeVar("Result")


@register_model("memformer")
class MemformerLM(LM):
    """A trained model of this library that answers the harness's three kinds of requests.

    Every text begins with `[BOS]` and is read segment by segment into the memory, whatever its length. Requests with
    the same context read it once.

    Args:
        pretrained: A run folder, a folder from `save_pretrained` or `memformer export`, or the name of a model on the
            Hugging Face hub.
        device: auto, cpu, cuda, cuda:0, ...
        batch_size: Number of contexts that are read side by side.
        checkpoint: Weights of a run: "best" or "last".
        num_slots: Number of memory slots, for models with `exchangeable_slots`. None: as trained.
        **unknown: Arguments that there are not; all are refused.

    Raises:
        InputError: `pretrained` is missing, an argument is unknown or out of range, the folder holds no model of texts,
            or the device does not exist.
        CheckpointError: A file is missing or damaged.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        device: str = "auto",
        batch_size: Integer | str = 1,
        checkpoint: str = "best",
        num_slots: Integer | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        refuse_unknown_keys(
            unknown,
            valid=("pretrained", "device", "batch_size", "checkpoint", "num_slots"),
            owner="the model memformer",
        )
        if pretrained is None:
            raise InputError("pretrained is missing: name a run or a saved model, --model_args pretrained=FOLDER")
        self.batch_size = _check_batch_size(batch_size)
        check_choice("checkpoint", checkpoint, ("best", "last"))
        num_slots = None if num_slots is None else check_integer("num_slots", num_slots, 1)
        self._device = choose_device(device)
        self.run = load_run(pretrained, which=checkpoint, device=self._device, num_slots=num_slots, warn=print_warning)
        if (kind := self.run.tokenizer.kind) in {"pixels", "bins"}:
            held = "images" if kind == "pixels" else "series"
            raise InputError(f"{self.run.folder} is a model of {held}; the evaluation harness needs one of texts")
        use_float32_on_cpu(self.run.model)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "MemformerLM":
        """Return the model of the harness's arguments, of which `--model_args` count more than its other options."""
        others = {name: value for name, value in (additional_config or {}).items() if value is not None}
        arguments = {**others, **arg_dict}
        if "pretrained" in arguments:
            arguments["pretrained"] = str(arguments["pretrained"])  # the harness takes the name 2024 for a number
        return cls(**arguments)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "MemformerLM":
        """Return the model of `name=value,name=value`; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer; equal if and only if all token ids mean the same."""
        return f"{self.run.tokenizer.kind}-{self.run.tokenizer.fingerprint}"

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether it is what greedy decoding generates.

        Args:
            requests: The harness's requests; the arguments of each are a context and its continuation.
            disable_tqdm: Show no progress.

        Raises:
            InputError: A text has words that the tokenizer cannot encode, it has no tokens for a continuation, or the
                model's weights are broken.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        answers = (
            (indices, nats_and_greedy(session, [pairs[index][1] for index in indices]))
            for session, indices in self._sessions([context for context, _ in pairs])
        )
        return self._collect("loglikelihood", requests, answers, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats, with every token given all tokens before it.

        Args:
            requests: The harness's requests; the argument of each is a text.
            disable_tqdm: Show no progress.

        Raises:
            InputError: As `loglikelihood`.
        """
        texts = [self._encode(request.args[0]) for request in requests]
        longest_first = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        answers = (
            (indices, nats_of(self.run.session(batch_size=len(indices)), [texts[index] for index in indices]))
            for indices in _in_parts(longest_first, self.batch_size)
        )
        return self._collect("loglikelihood_rolling", requests, answers, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that follows each context, up to a stop string or the end of the document.

        Args:
            requests: The harness's requests; the arguments of each are a context and the generation options `until`,
                `max_gen_toks`, `do_sample`, `temperature`, `top_k` and `top_p`.
            disable_tqdm: Show no progress.

        Raises:
            InputError: A generation option is not supported or out of range, or as `loglikelihood`.
        """
        contexts = [self._encode(request.args[0]) for request in requests]
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        options = {key: check_generation(json.loads(key)) for key in alike}

        def answers() -> Iterator[tuple[list[int], list[str]]]:
            for key, numbers in alike.items():
                for session, rows in self._sessions([contexts[index] for index in numbers]):
                    yield [numbers[row] for row in rows], generate(session, self.run.tokenizer, options[key])

        return self._collect("generate_until", requests, answers(), disable_tqdm=disable_tqdm)

    def _encode(self, text: str) -> Ids:
        return self.run.tokenizer.encode(utf_8_of(text, "a request"), name="of the request")

    def _encode_after(self, text: str) -> Ids:
        return encode_after(self.run.tokenizer, utf_8_of(text, "a request"), "of the request")

    def _encode_pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Return the token ids of both, as the harness's other models do: spaces between them are the continuation's.

        The continuation's ids are those of the joined text after the context's. Where the joined text has a token of
        both parts ("the ca" and "t"), they are those of the continuation alone: every continuation is scored in full.

        Raises:
            InputError: A text has words that the tokenizer cannot encode, or the continuation is of spaces alone, for
                which the tokenizer has no tokens.
        """
        stripped = context.rstrip()
        ids, joined = self._encode(stripped), self._encode(context + continuation)
        is_split = np.array_equal(joined[: len(ids)], ids)
        continued = joined[len(ids) :] if is_split else self._encode_after(context[len(stripped) :] + continuation)
        if continuation and not len(continued):
            raise InputError(f"the tokenizer has no tokens for the continuation {continuation!r} of a request")
        return ids, continued

    def _sessions(self, contexts: Sequence[Ids]) -> Iterator[tuple[Session, list[int]]]:
        """Yield sessions whose rows have read contexts, with the number of each row's context.

        Every context is in one row. Equal contexts are read once, the longest first.
        """
        equal: dict[bytes, list[int]] = defaultdict(list)
        for index, context in enumerate(contexts):
            equal[context.tobytes()].append(index)
        for part in _in_parts(sorted(equal.values(), key=lambda group: -len(contexts[group[0]])), self.batch_size):
            session = self.run.session(batch_size=len(part))
            session.feed([contexts[group[0]] for group in part])
            numbered = [(row, index) for row, group in enumerate(part) for index in group]
            for some in _in_parts(numbered, self.batch_size):
                reader = copy.deepcopy(session)
                reader.select_rows([row for row, _ in some])
                yield reader, [index for _, index in some]

    def _collect(
        self,
        kind: str,
        requests: list[Any],
        answers: Iterable[tuple[list[int], list[Result]]],
        *,
        disable_tqdm: bool,
    ) -> list[Result]:
        """Return the answers in the order of the requests; each goes into the harness's cache as soon as it is known.

        Args:
            kind: Kind of the requests.
            requests: The requests.
            answers: Numbers of requests, and their answers.
            disable_tqdm: Show no progress.
        """
        found: dict[int, Result] = {}
        disable = disable_tqdm or self.rank != 0
        with tqdm(total=len(requests), desc=f"Running {kind} requests", disable=disable) as progress:
            for indices, results in answers:
                for index, result in zip(indices, results, strict=True):
                    found[index] = result
                    self.cache_hook.add_partial(kind, requests[index].args, result)
                progress.update(len(indices))
        return [found[index] for index in range(len(requests))]


def _in_parts(items: Sequence[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _check_batch_size(value: Integer | str) -> int:
    """Return the batch size, which the harness's command line passes as text.

    Raises:
        InputError: It is not a positive integer.
    """
    try:
        return check_integer("batch_size", int(value) if isinstance(value, str) else value, 1)
    except (InputTypeError, ValueError) as error:
        raise InputError(f"batch_size ({value!r}) must be a positive integer; memory is constant, so try 8") from error
