"""What a request may ask: every field does something or is refused by name; the requests of real clients are read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from serving import direct, make_service, served

from qwenq.runtime.answers import Call, Calls, StopTexts
from qwenq.runtime.generate import Sampling, Session, next_token
from qwenq.runtime.requests import MAX_ANSWERS
from qwenq.runtime.server import Service, make_app

ASK = [{"role": "user", "content": "Tell me about the sea."}]
SEA = {"prompt": "The sea", "temperature": 0, "max_tokens": 12}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a place",
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]
TEMPLATE = (  # renders everything it is given, so that a prompt shows what came through
    "{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif -%}"
    "{%- for m in messages -%}[{{ m.role }}]{{ m.content }}"
    "{%- for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments.place }}</call>{% endfor -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}[assistant]{{ 'loud' if loud else '' }}{%- endif -%}"
)

Post = Callable[..., Any]


@pytest.fixture
def post(address: str) -> Iterator[Post]:
    """post(**fields): the JSON of an answer to a completion, or to a chat when there are messages."""
    with httpx.Client(base_url=address, timeout=60) as client:

        def ask(status: int = 200, **fields: Any) -> Any:
            path = "/v1/chat/completions" if "messages" in fields else "/v1/completions"
            answer = client.post(path, json=fields)
            assert answer.status_code == status, answer.text
            return answer.json()

        yield ask


@pytest.fixture(scope="module")
def tools_service(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """The tiny model with a template that renders tools."""
    path = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return make_service(path)


def text_of(answer: Any, index: int = 0) -> str:
    choice = answer["choices"][index]
    return choice["text"] if "text" in choice else choice["message"]["content"]


# ---------------------------------------------------------------------- refused by name, or let through


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", {"type": "json_object"}), ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("guided_json", {"type": "object"}), ("guided_regex", "a+"), ("guided_choice", ["a"]),
        ("grammar", "root ::= x"),
        ("structured_outputs", {"regex": "a"}), ("json_schema", {"type": "object"}), ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}), ("suffix", "end"), ("best_of", 2), ("echo", True), ("top_logprobs", 3),
        ("continue_final_message", True), ("add_generation_prompt", False), ("enable_thinking", False),
        ("chat_template", "{{ 1 }}"), ("documents", [{"text": "x"}]), ("reasoning_effort", "none"),
        ("thinking", {"type": "disabled"}), ("include_reasoning", False),
        ("use_beam_search", True), ("length_penalty", 2.0), ("allowed_token_ids", [1]), ("bad_words", ["x"]),
        ("prompt_logprobs", 1), ("truncate_prompt_tokens", 5), ("skip_special_tokens", False),
        ("include_stop_str_in_output", True), ("logits_processors", ["x"]), ("repeat_penalty", 1.1), ("mirostat", 2),
        ("typical_p", 0.5), ("n_predict", 5), ("modalities", ["text", "audio"]), ("audio", {"voice": "x"}),
        ("web_search_options", {}), ("frequence_penalty", 1.0), ("no_such_field", 0), ("__class__", "x"),
    ],
)  # fmt: skip
def test_fields_that_are_not_read_are_refused_by_name(name: str, value: Any, post: Post) -> None:
    error = post(400, messages=ASK, max_tokens=2, **{name: value})["error"]
    assert name in error["message"] and error["param"] == name and error["type"] == "invalid_request_error"
    if name not in ("tool_choice", "top_logprobs"):
        assert post(400, **SEA, **{name: value})["error"]["param"] == name


@pytest.mark.parametrize("option", [{"continuous_usage_stats": True}, {"no_such_option": 1}, {"include_usage": 5}])
def test_options_of_a_stream_are_read_or_refused(option: dict[str, Any], post: Post) -> None:
    error = post(400, **SEA, stream=True, stream_options=option)["error"]
    assert error["param"] == "stream_options" and f"stream_options.{next(iter(option))}: " in error["message"]


def test_what_asks_for_nothing_is_let_through(post: Post) -> None:
    harmless = {
        "user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "seed": None, "stop": None,
        "stream_options": None, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "n": 1,
        "keep_alive": "5m",
        "response_format": {"type": "text"}, "best_of": 1, "echo": False, "suffix": None, "top_p": 1, "top_k": -1,
        "min_p": 0, "repetition_penalty": 1.0, "length_penalty": 1.0, "guided_json": None, "no_such_field": None,
        "skip_special_tokens": True, "use_beam_search": False, "prompt_cache_key": "x", "safety_identifier": "y",
        "modalities": ["text"], "ignore_eos": False, "min_tokens": 0, "stop_token_ids": [], "cache_prompt": True,
    }  # fmt: skip
    assert text_of(post(**SEA, **harmless)) == text_of(post(**SEA))
    chat = {"messages": ASK, "temperature": 0, "max_tokens": 6}
    more = {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "functions": [], "function_call": "none",
            "logprobs": False, "top_logprobs": 0, "chat_template_kwargs": {},
            "add_generation_prompt": True}  # fmt: skip
    assert text_of(post(**chat, **harmless, **more)) == text_of(post(**chat))
    assert text_of(post(**chat, tools=TOOLS, tool_choice="none")) == text_of(post(**chat))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"), ({"max_tokens": -2}, "max_tokens: Input"), ({"top_k": -2}, "top_k:"),
        ({"top_p": 0}, "top_p:"), ({"min_p": 1.5}, "min_p:"), ({"temperature": -1}, "temperature:"),
        ({"repetition_penalty": 0}, "repetition_penalty:"), ({"presence_penalty": 3}, "presence_penalty:"),
        ({"logit_bias": {"1": 200}}, "logit_bias.1:"), ({"logit_bias": {"x": 1}}, "logit_bias.x:"),
        ({"logit_bias": {"5000": 1}}, "logit_bias has a token id outside 0..1023"), ({"seed": 1 << 64}, "seed:"),
        ({"stop_token_ids": [1024]}, "stop_token_ids has a token id outside"), ({"n": 0}, "n:"),
        ({"stop": ["x"] * 257}, "stop: wanted up to 256"), ({"stop": "x" * 9000}, "8192 characters in all"),
        ({"logprobs": 21}, "logprobs:"), ({"stop": 5}, "stop"), ({"stream": "maybe"}, "stream:"),
        ({"add_special_tokens": False}, "add_special_tokens"), ({"prompt": ["a"] * 70, "n": 2}, "wanted at most 128"),
        ({"prompt": ["a"] * 200}, "200 prompts"), ({"prompt": ""}, "the prompt is empty"), ({"prompt": []}, "empty"),
        ({"prompt": [[1], []]}, "empty"), ({"prompt": [1024]}, "prompt has a token id outside"),
        ({"prompt": ["a", 1]}, "prompt"), ({"prompt": None}, "prompt"), ({"max_tokens": 399}, "max_tokens 39"),
        ({"min_tokens": 13}, "min_tokens is 13, more than the 12 an answer may have"),
    ],
    ids=str,
)  # fmt: skip
def test_values_have_bounds(fields: dict[str, Any], says: str, post: Post) -> None:
    assert says in post(400, **SEA | fields)["error"]["message"]


# ---------------------------------------------------------------------- each field does what it says


def test_top_k_min_p_and_logit_bias_narrow_the_draw(post: Post) -> None:
    greedy = text_of(post(**SEA))
    hot = SEA | {"temperature": 2.0, "seed": 5}
    assert text_of(post(**hot)) != greedy
    for only in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}):
        assert text_of(post(**hot, **only)) == greedy
    assert text_of(post(**hot, top_k=0)) == text_of(post(**hot, top_k=-1)) == text_of(post(**hot))


def test_logit_bias_forces_and_bars(post: Post, service: Service) -> None:
    ids = service.chat.text_ids(" lighthouse")[:1]
    forced = post(**SEA, logit_bias={str(ids[0]): 100})
    assert text_of(forced) == "".join(service.chat.stream(ids * 12, service.chat.text_ids("The sea")))
    first = next(iter(service.session.generate(service.chat.text_ids("The sea"), Sampling(max_new_tokens=1))))
    assert text_of(post(**SEA, logit_bias={str(first): -100})) != text_of(post(**SEA))


def test_penalties_are_openais_and_transformers() -> None:
    from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

    generator, scores = torch.Generator().manual_seed(0), torch.randn(50, generator=torch.Generator().manual_seed(1))
    seen = [3, 3, 7, 7, 7, 9]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), scores[None].clone())[0]
    ours = next_token(scores, seen, Sampling(repetition_penalty=1.7), generator, new=4)
    assert ours == int(theirs.argmax())
    wanted = scores.clone()  # the last four are the answer's: 7 three times, 9 once
    wanted[7] -= 0.9 + 3 * 0.6
    wanted[9] -= 0.9 + 0.6
    for token in scores.topk(50).indices.tolist():  # with all likelier ones barred, each order is seen
        sampling = Sampling(presence_penalty=0.9, frequency_penalty=0.6)
        barred = [k for k in range(50) if wanted[k] > wanted[token]]
        assert next_token(scores, seen, sampling, generator, new=4, barred=barred) == token
    kept = {int(k) for k in MinPLogitsWarper(0.2)(None, scores[None].clone())[0].isfinite().nonzero()}
    drawn = {next_token(scores, [], Sampling(temperature=1.0, min_p=0.2), generator) for _ in range(2000)}
    assert drawn == kept and 1 < len(kept) < 20


def test_repetition_penalty_and_openais_change_the_answer(post: Post) -> None:
    asked = SEA | {"max_tokens": 60}
    texts = [text_of(post(**asked, **more)) for more in (
        {}, {"repetition_penalty": 1.5}, {"presence_penalty": 2}, {"frequency_penalty": 2})]  # fmt: skip
    assert len(set(texts)) == 4


def test_stop_tokens(post: Post, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = service.chat.text_ids("The sea")
    made = list(service.session.generate(ids, Sampling(max_new_tokens=12)))
    stop = next(k for k in range(2, 12) if made[k] not in made[:k])
    before = "".join(service.chat.stream(made[:stop], ids))
    answer = post(**SEA, stop_token_ids=[made[stop]])
    assert text_of(answer) == before and answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == stop
    monkeypatch.setattr(service.session, "stop_ids", frozenset({made[stop]}))  # as if it were the model's
    assert text_of(post(**SEA)) == before
    ignored = post(**SEA, ignore_eos=True)
    assert ignored["usage"]["completion_tokens"] == 12 and ignored["choices"][0]["finish_reason"] == "length"
    later = post(**SEA, min_tokens=stop + 2)
    assert later["usage"]["completion_tokens"] >= stop + 2 and text_of(later).startswith(before)


def test_min_tokens_holds_for_stop_texts(post: Post) -> None:
    whole = text_of(post(**SEA))
    stop = whole[3:5]
    assert text_of(post(**SEA, stop=stop)) == whole[: whole.index(stop)]
    assert len(text_of(post(**SEA, stop=stop, min_tokens=8))) > whole.index(stop)


def test_many_stops(post: Post) -> None:
    whole = text_of(post(**SEA))
    stops = [f"@{k}" for k in range(20)] + [whole[6:9]]
    assert text_of(post(**SEA, stop=stops)) == whole[: whole.index(whole[6:9])]


def test_no_max_tokens_means_what_the_context_leaves(
    post: Post, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the model's own number, where its generation_config.json has one."""
    prompt = "The sea. " * 90  # most of the context's 400 tokens
    left = 400 - len(service.chat.text_ids(prompt))
    assert 10 < left < 100
    for fields in ({}, {"max_tokens": -1}, {"max_tokens": None}):
        answer = post(prompt=prompt, temperature=0, ignore_eos=True, **fields)
        assert answer["usage"]["completion_tokens"] == left
        assert answer["choices"][0]["finish_reason"] == "length"
    monkeypatch.setitem(service.chat._generation, "max_new_tokens", left - 3)
    for number, wanted in ((None, left - 3), (-1, left), (left - 1, left - 1)):
        answer = post(prompt=prompt, temperature=0, ignore_eos=True, max_tokens=number)
        assert answer["usage"]["completion_tokens"] == wanted
    answer = post(messages=ASK, temperature=0, max_completion_tokens=3, max_tokens=5, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 3


def test_seed_minus_one_is_no_seed(post: Post) -> None:
    texts = {text_of(post(**SEA | {"temperature": 2.0, "seed": -1})) for _ in range(4)}
    assert len(texts) > 1
    fixed = {text_of(post(**SEA | {"temperature": 2.0, "seed": -2})) for _ in range(3)}
    assert len(fixed) == 1


def test_several_answers_draw_with_the_seeds_after_the_first(post: Post) -> None:
    hot = SEA | {"temperature": 1.5}
    answer = post(**hot, n=3, seed=7)
    alone = [text_of(post(**hot, seed=seed)) for seed in (7, 8, 9)]
    assert [choice["text"] for choice in answer["choices"]] == alone and len(set(alone)) == 3
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 36 and answer["usage"]["prompt_tokens"] < 10
    assert len(post(**hot, n=2, seed=2**63 - 1)["choices"]) == 2


def test_several_prompts(post: Post, service: Service) -> None:
    texts = ["The sea", "A ship", "The sea"]
    answer = post(**SEA | {"prompt": texts})
    wanted = [text_of(post(**SEA | {"prompt": text})) for text in texts]
    assert [choice["text"] for choice in answer["choices"]] == wanted
    ids = [service.chat.text_ids(text) for text in texts]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert [choice["text"] for choice in post(**SEA | {"prompt": ids})["choices"]] == wanted
    assert text_of(post(**SEA | {"prompt": ["The sea"]})) == text_of(post(**SEA | {"prompt": ids[0]})) == wanted[0]
    both = post(**SEA | {"prompt": texts[:2]}, n=2)
    assert [choice["text"] for choice in both["choices"]] == [wanted[0]] * 2 + [wanted[1]] * 2
    assert len(post(prompt=["x"], n=MAX_ANSWERS, max_tokens=1)["choices"]) == MAX_ANSWERS


def test_tokens_that_are_parts_of_a_character_have_its_bytes(post: Post, service: Service) -> None:
    tokenizer, character = service.chat.tokenizer, "日"
    ids = tokenizer.encode([character])[0]
    assert len(ids) == 3, "a byte each"
    text = "日本 é 🙂\n\tx\x00\u00ad"
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode([text])[0])) == text.encode()
    first = {"logit_bias": {str(ids[0]): 100}, "max_tokens": 1}
    chat = post(messages=ASK, logprobs=True, **first)["choices"][0]["logprobs"]["content"][0]
    assert (chat["bytes"], chat["token"]) == ([0xE6], "\ufffd")
    (top,) = post(**SEA | first, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"]
    assert list(top) == ["bytes:\\xe6"]


def test_logprobs_are_transformers_own(post: Post, service: Service, tiny: Path) -> None:
    import transformers

    ids = service.chat.text_ids("The sea")
    made = list(service.session.generate(ids, Sampling(max_new_tokens=6)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.tensor([[*ids, *made]])).logits[0, len(ids) - 1 : -1]
    wanted = logits.log_softmax(-1)
    found = post(**SEA | {"max_tokens": 6, "logprobs": 3})["choices"][0]["logprobs"]
    for k, token in enumerate(made):
        assert math.isclose(found["token_logprobs"][k], float(wanted[k, token]), abs_tol=1e-3)
        best = wanted[k].topk(3).values.tolist()
        assert sorted(found["top_logprobs"][k].values(), reverse=True)[:3] == pytest.approx(best, abs=1e-3)
    assert "".join(found["tokens"]) == text_of(post(**SEA | {"max_tokens": 6}))
    assert found["text_offset"] == [len("".join(found["tokens"][:k])) for k in range(6)]
    assert post(**SEA, logprobs=0)["choices"][0]["logprobs"]["token_logprobs"]
    chat = post(messages=ASK, temperature=0, max_tokens=4, logprobs=True, top_logprobs=2)["choices"][0]
    assert [len(each["top_logprobs"]) for each in chat["logprobs"]["content"]] == [2] * 4
    assert "".join(each["token"] for each in chat["logprobs"]["content"]) == chat["message"]["content"]
    # a hot draw's figures are the model's own, not the draw's
    cold, hot = (post(**SEA | {"max_tokens": 1, "logprobs": 1, "temperature": t, "seed": 1}) for t in (0, 5.0))
    tops = [each["choices"][0]["logprobs"]["top_logprobs"][0] for each in (cold, hot)]
    assert max(tops[0].values()) == pytest.approx(max(tops[1].values()))


def test_offsets_of_a_stream_are_those_of_the_whole(address: str, post: Post) -> None:
    """Text that may begin a stop text is held back, its tokens are not."""
    begun = text_of(post(**SEA))[:6]
    asked = SEA | {"logprobs": 0, "stop": begun + "@"}
    whole = post(**asked)["choices"][0]["logprobs"]
    streamed: dict[str, list[Any]] = {"tokens": [], "text_offset": []}
    with httpx.stream("POST", f"{address}/v1/completions", json=asked | {"stream": True}, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                found = json.loads(line[6:])["choices"][0]["logprobs"] or {}
                for key, values in streamed.items():
                    values += found.get(key, [])
    assert streamed == {key: whole[key] for key in streamed} and len(whole["tokens"]) == 12


# ---------------------------------------------------------------------- tools


def prompts_of(service: Service, monkeypatch: pytest.MonkeyPatch, says: str) -> list[str]:
    """Make the model say something; the prompts that it gets are noted as text."""
    seen: list[str] = []
    said = service.chat.text_ids(says)

    def generate(session: Session, ids: Any, sampling: Any, timing: Any, *rest: Any, **more: Any) -> Iterator[int]:
        seen.append(service.chat.tokenizer._tokenizer.decode(list(ids), skip_special_tokens=False))
        timing.prompt_tokens = len(ids)
        for token in said:
            timing.new_tokens += 1
            yield token
        timing.stopped = "stop"

    monkeypatch.setattr(Session, "generate", generate)
    return seen


def test_tools_reach_the_template_and_calls_come_back(
    tools_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = 'I look.\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>\n'
    seen = prompts_of(tools_service, monkeypatch, says + says.removeprefix("I look.\n").replace("Rome", "Oslo"))
    history: list[Any] = [
        {"role": "user", "content": "Paris?"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "Paris"}'}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "user", "content": "And Rome?"},
    ]  # fmt: skip
    with served(make_app(tools_service)) as address:
        client = openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=60)
        asked: Any = {"model": "tiny", "messages": history, "tools": TOOLS}
        answer = client.chat.completions.create(**asked).choices[0]
        assert '<tools>[{"type": "function"' in seen[0] and "<call>weather Paris</call>" in seen[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content == "I look."
        calls = answer.message.tool_calls
        assert calls is not None and [json.loads(call.function.arguments) for call in calls] == [  # type: ignore[union-attr]
            {"place": "Rome"}, {"place": "Oslo"}]  # fmt: skip
        assert len({call.id for call in calls}) == 2
        one = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0].message.tool_calls
        assert one is not None and len(one) == 1
        plain = client.chat.completions.create(model="tiny", messages=history[3:]).choices[0]
        assert "<tool_call>" in (plain.message.content or "") and plain.finish_reason == "stop"
        with client.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion().choices[0]
        assert final.finish_reason == "tool_calls"
        assert [call.function.arguments for call in final.message.tool_calls or []] == [
            call.function.arguments for call in calls]  # type: ignore[union-attr]  # fmt: skip
        client.close()


def test_template_settings(tools_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = prompts_of(tools_service, monkeypatch, "yes")
    with served(make_app(tools_service)) as address:
        for settings in ({"loud": True}, {}):
            body = {"messages": ASK, "chat_template_kwargs": settings}
            assert httpx.post(address + "/v1/chat/completions", json=body, timeout=60).status_code == 200
        assert [prompt.endswith("loud") for prompt in seen] == [True, False]
        body = {"messages": ASK, "chat_template_kwargs": {"messages": []}}
        refused = httpx.post(address + "/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == 400 and "cannot say messages" in refused.text


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_calls_are_found_however_the_text_is_cut(step: int) -> None:
    def read(text: str) -> list[str | tuple[str, str]]:
        calls, found = Calls(9), []
        for start in range(0, len(text), step):
            found += list(calls.feed(text[start : start + step]))
        found += list(calls.end())
        merged: list[str | tuple[str, str]] = []
        for each in found:
            if isinstance(each, Call):
                merged.append((each.name, each.arguments))
            elif merged and isinstance(merged[-1], str):
                merged[-1] += each
            else:
                merged.append(each)
        return merged

    call = '<tool_call>{"name": "f", "arguments": {"x": "<b>"}}</tool_call>'
    assert read(f"a < b {call}\n{call}") == ["a < b ", ("f", '{"x": "<b>"}'), ("f", '{"x": "<b>"}')]
    assert read(call.removesuffix("</tool_call>")) == [("f", '{"x": "<b>"}')]
    for text in ("<tool_call>{</tool_call>", "<tool_call>[1]</tool_call>", "<tool_cal", "x <tool_call>", "</tool_call>",
                 '<tool_call>{"name": 1}</tool_call> more', "<tool_call>" + "[" * 9999 + "</tool_call>"):  # fmt: skip
        assert read(text) == [text]


def test_stop_texts_however_the_text_is_cut() -> None:
    text = "one two three"
    for step in (1, 2, 5, 100):
        stops = StopTexts(["two t", "ee", "zz"])
        shown = ""
        for start in range(0, len(text), step):
            shown += stops.feed(text[start : start + step])
            if stops.found:
                break
        assert shown + stops.end() == "one " and stops.found
    open_end = StopTexts(["three!", "e!"])
    assert "".join(open_end.feed(letter) for letter in text) + open_end.end() == text and not open_end.found


# ---------------------------------------------------------------------- real clients


def test_the_openai_client_finds_the_model(address: str) -> None:
    with openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError, match="the model here is 'tiny'"):
            client.models.retrieve("gpt-4")
        with pytest.raises(openai.NotFoundError, match="Not Found"):
            client.embeddings.create(model="tiny", input="x")
        with pytest.raises(openai.BadRequestError, match="response_format is not supported"):
            client.chat.completions.create(model="tiny", messages=ASK, response_format={"type": "json_object"})  # type: ignore[arg-type]


def test_the_openai_client_streams_several_answers(address: str, post: Post) -> None:
    with openai.OpenAI(base_url=address + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        asked: Any = {"model": "tiny", "messages": ASK, "temperature": 1.2, "seed": 3, "n": 2, "max_tokens": 10}
        texts, finishes, logprobs = ["", ""], [None, None], 0
        for part in client.chat.completions.create(**asked, stream=True, logprobs=True, stream_options={
            "include_usage": True}):  # fmt: skip
            for choice in part.choices:
                texts[choice.index] += choice.delta.content or ""
                finishes[choice.index] = choice.finish_reason or finishes[choice.index]
                logprobs += len((choice.logprobs and choice.logprobs.content) or [])
        assert part.usage is not None and part.usage.completion_tokens == logprobs <= 20
        whole = client.chat.completions.create(**asked)
        assert texts == [choice.message.content for choice in whole.choices]
        assert finishes == [choice.finish_reason for choice in whole.choices]


def test_langchains_request(post: Post, service: Service) -> None:
    """ChatOpenAI's body: what was not set is null or at its default, stops of an agent, a JSON `n`."""
    body = {
        "messages": [
            {"content": "Answer in one line.", "role": "system"},
            {"role": "user", "content": [{"type": "text", "text": "About"}, {"type": "text", "text": "the sea."}]},
        ],
        "model": "tiny", "frequency_penalty": None, "presence_penalty": None, "logit_bias": None, "n": 1,
        "stop": ["\nObservation:", "\nObservation", "Observation:", "\n\tObservation", "Final Answer"],
        "stream": False, "temperature": 0.7, "top_p": None, "seed": None, "logprobs": None, "user": None,
        "max_completion_tokens": 20, "parallel_tool_calls": None, "tools": None, "extra_body": None,
    }  # fmt: skip
    answer = post(**body)
    plain = [{"role": "system", "content": "Answer in one line."}, {"role": "user", "content": "About\nthe sea."}]
    assert answer["usage"]["prompt_tokens"] == len(service.chat.prompt_ids(plain))
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_continues_requests(address: str, service: Service) -> None:
    """Continue: a streamed chat with its own limit, and text to complete with its stops, from a Docker container."""
    headers = {"Host": "host.docker.internal:8000", "Authorization": "Bearer none", "api-key": "none",
               "Content-Type": "application/json", "User-Agent": "node-fetch"}  # fmt: skip
    chat = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sea?"}],
        "model": "tiny", "max_tokens": 64, "temperature": 0.5, "top_p": None, "frequency_penalty": None,
        "presence_penalty": None, "stream": True, "stop": ["<|im_start|>", "<|im_end|>"],
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    answer = httpx.post(address + "/v1/chat/completions", json=chat, headers=headers, timeout=60)
    assert answer.status_code == 200 and answer.text.rstrip().endswith("data: [DONE]")
    assert answer.headers["content-type"].startswith("text/event-stream")
    complete = {
        "prompt": "The sea is", "model": "tiny", "max_tokens": 16, "temperature": 0.01, "stream": True,
        "stop": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>", "<|endoftext|>", "</fim>",
                 "\n\n", "\r\n\r\n", "/src/", "#- coding: utf-8", "```"],
    }  # fmt: skip
    answer = httpx.post(address + "/v1/completions", json=complete, headers=headers, timeout=60)
    assert answer.status_code == 200 and "[DONE]" in answer.text


def test_an_agents_requests(tools_service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent's loop: tools, a call, its result, an answer; a strict tool, ids and names as agents send them."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n</tool_call>'
    seen = prompts_of(tools_service, monkeypatch, call)
    strict = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}]  # type: ignore[operator]
    body: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "developer", "content": "Use tools."}, {"role": "user", "content": "Rome?"}],
        "tools": strict, "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "temperature": 1,
        "metadata": {"run": "1"}, "top_p": 1, "user": "agent-7", "prompt_cache_key": "k",
    }  # fmt: skip
    with served(make_app(tools_service)) as address:
        first = httpx.post(address + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
        assert first["finish_reason"] == "tool_calls" and first["message"]["content"] is None
        (asked,) = first["message"]["tool_calls"]
        assert asked["type"] == "function"
        assert asked["function"] == {"name": "weather", "arguments": '{"place": "Rome"}'}
        monkeypatch.undo()
        seen = prompts_of(tools_service, monkeypatch, "It rains.")
        body["messages"] += [
            first["message"] | {"refusal": None, "annotations": []},
            {"role": "tool", "tool_call_id": asked["id"], "name": "weather", "content": [
                {"type": "text", "text": "rain"}]},
        ]  # fmt: skip
        second = httpx.post(address + "/v1/chat/completions", json=body, timeout=60).json()["choices"][0]
    assert "<call>weather Rome</call>" in seen[0] and "[tool]rain" in seen[0] and "[system]Use tools." in seen[0]
    assert second["message"] == {"role": "assistant", "content": "It rains."} and second["finish_reason"] == "stop"


def test_chat_with_a_base_model_is_refused(model: Path, edit_json: Any) -> None:
    edit_json(model / "tokenizer_config.json", chat_template=None)
    service = make_service(model)
    with served(make_app(service)) as address:
        refused = httpx.post(address + "/v1/chat/completions", json={"messages": ASK}, timeout=60)
        assert refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]
        text = httpx.post(address + "/v1/completions", json=SEA, timeout=60)
        assert text.json()["choices"][0]["text"] == direct(service, service.chat.text_ids("The sea"), 12)


def test_a_templates_refusal_names_no_directory(tools_service: Service) -> None:
    with served(make_app(tools_service)) as address:
        body = {"messages": [{"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "f", "arguments": "{"}}]}]}  # fmt: skip
        error = httpx.post(address + "/v1/chat/completions", json=body, timeout=60)
        assert error.status_code == 400 and "not JSON" in error.text
        assert str(tools_service.chat.directory) not in error.text
