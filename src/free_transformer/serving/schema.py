"""The bodies of client requests: OpenAI's completions and chat completions, with plans."""

import difflib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    SkipValidation,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import from_json

from free_transformer.errors import InputError
from free_transformer.model.sampling import check_seed, check_temperature, check_top_k, check_top_p

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_SCORE_PLANS = 256
MAX_ITEMS = 4096  # prompts of a request, or plans
MAX_SHOWN = 60  # characters of a value in a message
PROMPT = f"prompt: must be text, token ids, or a list of up to {MAX_ITEMS} of either"
PLAN_CHANGES = 'plan_changes: must be plans keyed by a number of new tokens, such as {"2000": "01101001"}'
PLAN = "plan: must be bits as text, '01101001', or as numbers, [0, 1, ...], or a list of such plans"

CHECKS: dict[str | None, Callable[[float], float]] = {
    "temperature": check_temperature,
    "top_p": check_top_p,
    "top_k": check_top_k,
    "seed": check_seed,
}
# Checked by the validators below: pydantic tries every member of a union, even on lists of a hundred thousand lists.
Prompt = Annotated[str | list[str] | list[int] | list[list[int]], SkipValidation]
Plan = Annotated[str | list[Literal[0, 1]] | list[list[Literal[0, 1]]], SkipValidation]
Stop = Annotated[str | list[str], SkipValidation]
Unchecked = Annotated[JsonValue, SkipValidation, WithJsonSchema({})]
Value = TypeVar("Value")


class RequestError(Exception):
    """A client request is rejected with an HTTP status and a message."""

    def __init__(self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="accepted and ignored")


class GenerationRequest(_Body):
    """The fields shared by both kinds of completion. Fields from `plan` on are extensions of this server."""

    model: str | None = Field(None, description="name of the model, as listed by /v1/models")
    temperature: float = Field(1.0, description="0 to 100; 0 chooses the most likely token")
    top_p: float = Field(1.0, description="0 to 1; sample from the most likely tokens with this total probability")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="number of texts per prompt")
    stop: Stop = Field([], description="strings that end the text and are not part of it")
    seed: int | None = Field(None, description="makes plans and tokens reproducible; -2**63 to 2**64 - 1")
    stream: bool = Field(False, description="send the text in pieces, as server-sent events")
    stream_options: StreamOptions = StreamOptions()
    user: Unchecked = Field(None, description="accepted and ignored, like the next four fields")
    metadata: Unchecked = None
    store: Unchecked = None
    service_tier: Unchecked = None
    safety_identifier: Unchecked = None
    logit_bias: dict[str, float] | None = Field(None, description="not supported: empty")
    presence_penalty: float = Field(0, description="not supported: 0")
    frequency_penalty: float = Field(0, description="not supported: 0")
    plan: Plan | None = Field(
        None, description="bits of the plan, bit 0 first, as in 01101001 or [0, 1, 1, ...]; or a list of plans"
    )
    plan_changes: Annotated[dict[int, Plan], SkipValidation] | None = Field(
        None, description='later plans, keyed by the number of new tokens before them: {"2000": "10010110"}'
    )
    plan_from: str | None = Field(None, description="example text; the encoder infers its plan, which is used")
    prompt_plan: Literal["posterior", "prior"] | None = Field(
        None,
        description="plan of the prompt: inferred by the encoder (posterior, the default) or sampled from the prior",
    )
    prior: Literal["uniform", "aggregate"] = Field(
        "uniform", description="distribution of all other plans: uniform, or aggregate (over the training texts)"
    )
    plans: Literal["independent", "stratified"] = Field(
        "independent", description="how the plans of n texts are sampled; stratified: together they cover the plans"
    )
    top_k: int = Field(0, description="sample from this many most likely tokens; 0 means all")

    @field_validator("temperature", "top_p", "top_k", "seed")
    @classmethod
    def _in_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        return CHECKS[info.field_name](value) if value is not None else None

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: JsonValue) -> list[str]:
        given = [value] if isinstance(value, str) else value
        fits = isinstance(given, list) and len(given) <= MAX_STOPS and _types(given) <= {str}
        stops = cast(list[str], given if fits else [])
        if not fits or any(not 1 <= len(each) <= MAX_STOP_LENGTH for each in stops):
            raise InputError(f"stop: must be up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
        return stops

    @field_validator("plan")
    @classmethod
    def _plan(cls, value: object) -> object:
        if _is_plan(value):
            return value
        raise InputError(PLAN)

    @field_validator("plan_changes")
    @classmethod
    def _plan_changes(cls, value: object) -> object:
        if not isinstance(value, dict) or len(value) > MAX_ITEMS or not all(map(_is_plan, value.values())):
            raise InputError(PLAN_CHANGES)
        if not all(key.isascii() and key.isdigit() and len(key) < 16 for key in value):
            raise InputError(PLAN_CHANGES)
        return {int(start): plan for start, plan in value.items()}

    @field_validator("logit_bias", "presence_penalty", "frequency_penalty")
    @classmethod
    def _not_supported(cls, value: Value) -> Value:
        if value:
            raise InputError("not supported by this server; leave it out")
        return value

    def stops(self) -> list[str]:
        """Returns the strings that end the text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    prompt: Prompt = Field(
        "", description="text to continue, or token ids including the begin-of-text token; or a list of either"
    )
    max_tokens: int = Field(16, ge=0, description="maximum number of new tokens; 0 returns only the prompt, with echo")
    echo: bool = Field(False, description="return the prompt at the beginning of the text")
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="return log-probabilities of tokens and of this many likely ones; with echo also of the prompt",
    )
    num_plans: int = Field(
        16,
        ge=1,
        le=MAX_SCORE_PLANS,
        description="number of plans over which a prompt's log-probabilities are averaged (echo, max_tokens up to 1)",
    )
    best_of: int | None = Field(None, description="not supported: n")
    suffix: str | None = Field(None, description="not supported: empty")

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: object) -> object:
        if isinstance(value, str) or _types(value) in ({str}, {int}):
            return value
        if value == []:
            raise InputError("prompt: is an empty list; give text, or '' for an empty prompt")
        if isinstance(value, list) and _types(value) == {list} and len(value) <= MAX_ITEMS:
            if [] in value:
                raise InputError("prompt: has no tokens; give at least the begin-of-text token")
            if all(_types(row) == {int} for row in value):
                return value
        raise InputError(PROMPT)

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise InputError("not supported by this server; leave it out")
        return value

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts, each as text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [cast(list[int], self.prompt)]
        return cast(list[str | list[int]], self.prompt)


class ContentPart(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation. Further fields are passed to the chat template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[ContentPart]


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        description="the conversation so far", min_length=1
    )
    max_tokens: int | None = Field(
        None, ge=1, description="maximum number of new tokens; default: as many as the model can hold"
    )
    max_completion_tokens: int | None = Field(None, ge=1, description="the same as max_tokens, and overrides it")
    logprobs: bool = Field(False, description="return log-probabilities of tokens")
    top_logprobs: int = Field(0, ge=0, le=MAX_LOGPROBS, description="also return those of this many most likely tokens")
    response_format: Unchecked = Field(None, description='not supported: {"type": "text"}')
    tools: Unchecked = Field(None, description="not supported: empty")
    tool_choice: Unchecked = Field(None, description="not supported: none or auto")
    parallel_tool_calls: Unchecked = Field(None, description="accepted and ignored")
    prompt_cache_key: Unchecked = Field(None, description="accepted and ignored")

    @field_validator("response_format", "tools", "tool_choice")
    @classmethod
    def _only_text(cls, value: JsonValue) -> JsonValue:
        if value and value not in ("none", "auto", {"type": "text"}):
            raise InputError("not supported by this server; leave it out")
        return value

    def template_messages(self) -> list[dict[str, object]]:
        """Returns the messages for a chat template, with the parts of each content joined."""
        messages: list[dict[str, object]] = []
        for message in self.messages:
            content = message.content
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            messages.append({**message.model_dump(), "content": text})
        return messages


Request = TypeVar("Request", bound=GenerationRequest)


def parse_body(body: bytes, kind: type[Request]) -> Request:
    """
    Parses a body. Null fields get their defaults, as in OpenAI's API.

    Raises:
        RequestError: for a body that is not JSON or does not match `kind`. The message names the first problem.
    """
    try:
        values = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        try:
            body.decode()
        except UnicodeDecodeError as undecoded:
            raise RequestError(400, f"the body is not UTF-8 (byte {undecoded.start}): send JSON in UTF-8") from error
        if name := _field_with_lone_surrogate(body):
            message = f"{name}: contains a lone surrogate, \\ud800 to \\udfff without its other half"
            raise RequestError(400, message, name) from error
        raise RequestError(400, f"the body is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(400, f"the body is a JSON {_json_kind(values)}: expected a JSON object")
    for name in values:
        if name not in kind.model_fields:
            near = difflib.get_close_matches(name[:MAX_SHOWN], kind.model_fields, 1)
            hint = f"; did you mean {near[0]}?" if near else "; fields are " + ", ".join(kind.model_fields)
            raise RequestError(400, f"{_shortened(name)}: unknown field{hint}", _shortened(name))
    try:
        return kind.model_validate({name: value for name, value in values.items() if value is not None})
    except ValidationError as error:
        name, message = _explain(error.errors(include_url=False, include_context=False)[0])
        raise RequestError(400, message, name) from error


def _explain(error: "ErrorDetails") -> tuple[str, str]:
    """Returns the field of a validation error, and a message with its value and what is allowed."""
    name = str(error["loc"][0])
    message = error["msg"].removeprefix("Value error, ")
    if message.startswith(name):
        return name, message
    # without the member of a union, `str` or `list[...]`
    path = ".".join(str(part) for part in error["loc"] if part != "str" and "[" not in str(part))
    if error["type"] == "missing":
        return name, f"{path}: missing"
    return name, f"{path}={_shortened(json.dumps(_abridged(error.get('input')), ensure_ascii=False))}: {message}"


def bits_of(plan: Plan) -> str:
    """Converts plans to text: bits, or a name."""
    if isinstance(plan, str):
        return plan
    if isinstance(plan[0], int):
        return "".join(map(str, plan))
    return " ".join("".join(map(str, row)) for row in plan if isinstance(row, list))


def _is_plan(value: object) -> bool:
    rows = [value] if _types(value) == {int} else value
    return isinstance(value, str) or (
        isinstance(rows, list)
        and 0 < len(rows) <= MAX_ITEMS
        and all(isinstance(row, list) and _types(row) == {int} and {*row} <= {0, 1} for row in rows)
    )


def _types(value: object) -> set[type]:
    """Returns the types of the items of a list, or an empty set for any other value."""
    return {*map(type, value)} if isinstance(value, list) else set()


def _field_with_lone_surrogate(body: bytes) -> str | None:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        return None
    for name, value in values.items() if isinstance(values, dict) else ():
        try:
            name.encode()
        except UnicodeEncodeError:
            return "the name of a field"
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return _shortened(name)
    return None


def _abridged(value: object) -> object:
    """Shortens a value for a message."""
    if isinstance(value, str):
        return value[:MAX_SHOWN]
    if isinstance(value, list):
        return [_abridged(each) for each in value[:3]]
    if isinstance(value, dict):
        return {name[:MAX_SHOWN]: _abridged(each) for name, each in list(value.items())[:3]}
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**20:
        return "an integer of more than 20 digits"
    return value


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _json_kind(value: object) -> str:
    kinds = {list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
