"""The runner on one rank and a random model: what a request gets must not depend on how its steps were cut.

Requests are planned by a real scheduler; what they should get comes from one dense forward over the whole text.
"""

from __future__ import annotations

import pytest
import torch

from moe_serve.base.commands import AllocateKV, Meeting
from moe_serve.base.config import Config
from moe_serve.base.progress import Progress
from moe_serve.base.sampling import SamplingParams
from moe_serve.engine.core import EngineCore
from moe_serve.executor.uni import UniExecutor
from moe_serve.worker.loading.loader import load_weights
from tests.support.dummy_model import SIZES, dummy_model
from tests.support.forward import all_logits, alone, empty_decoder

ALONE = Meeting.of_nobody(1)
VOCAB = SIZES["vocab_size"]
EOS = SIZES["eos_token_id"]
GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = {
    name: torch.randint(3, VOCAB, (length,), generator=GENERATOR).tolist()
    for name, length in {"a": 37, "b": 5, "c": 1, "d": 64, "e": 18, "f": 33}.items()
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dummy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine_for(model):
    """Engines by their options; every test finds the one it wants loaded."""
    made = {}

    def find(num_blocks=200, **options):
        key = (num_blocks, *sorted(options.items()))
        if key not in made:
            made[key] = Engine(model, num_blocks, options)
        return made[key]

    yield find
    for engine in made.values():
        engine.executor.close()


class Engine:
    """A core and its worker, and what came out of them."""

    def __init__(self, model, num_blocks, options):
        given = {"model": str(model), "load_format": "dummy", "device": "cpu", "block_size": 4, "max_model_len": 128}
        given["all2all_backend"] = "allgather_reducescatter"  # nothing resolves "auto" here
        config = Config.from_flat(given | options)
        self.executor = UniExecutor(config, ALONE, Progress())
        self.executor.start()
        self.executor.submit(AllocateKV(num_blocks)).result()
        self.core = EngineCore(
            self.executor,
            config=config,
            num_blocks=num_blocks,
            max_model_len=128,
            vocab_size=VOCAB,
            eos_token_ids=[EOS],
        )

    def answer(self, requests, late=None):
        """Tokens, log-probabilities and the rest of each request by name; those in `late` come after so many steps."""
        late = late or {}
        found = {name: Answer() for name in requests}
        step = 0
        waiting = dict(requests)
        while waiting or self.core.has_work:
            for name in [name for name in waiting if late.get(name, 0) <= step]:
                prompt, sampling = waiting.pop(name)
                self.core.add(name, list(prompt), sampling)
            for event in self.core.step():
                found[event.request_id].take(event)
            step += 1
        return found

    def tokens(self, requests, late=None):
        return {name: answer.token_ids for name, answer in self.answer(requests, late).items()}


class Answer:
    def __init__(self):
        self.token_ids = []
        self.logprobs = []
        self.prompt_logprobs = None
        self.finish_reason = None

    def take(self, event):
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs or []
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = event.finish_reason


def greedy(**options):
    return SamplingParams(**({"temperature": 0, "max_tokens": 12, "ignore_eos": True} | options))


def seeded(seed, **options):
    return SamplingParams(**({"temperature": 0.9, "top_p": 0.9, "seed": seed, "max_tokens": 12} | options))


def mixed():
    """Every prompt, greedy and drawn in turn."""
    return {
        name: (prompt, greedy() if index % 2 else seeded(index, ignore_eos=True))
        for index, (name, prompt) in enumerate(PROMPTS.items())
    }


@pytest.fixture(scope="module")
def decoder(model):
    found = empty_decoder(model, groups=alone())
    load_weights(found, model, load_format="dummy")
    return found


@pytest.fixture(scope="module")
def one_by_one(engine_for):
    """What each of mixed() gets when it is alone and its prompt is computed at once."""
    engine = engine_for()
    return {name: engine.tokens({name: request})[name] for name, request in mixed().items()}


def test_greedy_tokens_are_the_best_of_a_dense_forward_over_the_whole_text(engine_for, decoder):
    found = engine_for().tokens({name: (prompt, greedy()) for name, prompt in PROMPTS.items()})
    for name, prompt in PROMPTS.items():
        (logits,) = all_logits(decoder, [[prompt + found[name]]])
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == found[name]


def test_requests_in_one_batch_get_what_they_get_alone(engine_for, one_by_one):
    assert engine_for().tokens(mixed()) == one_by_one


def test_requests_that_come_at_different_times_get_what_they_get_alone(engine_for, one_by_one):
    late = {"b": 3, "a": 4, "e": 9}
    assert engine_for().tokens(mixed(), late) == one_by_one


@pytest.mark.parametrize("budget", [6, 7, 16])
def test_a_prompt_computed_in_chunks_gives_the_same_tokens(engine_for, one_by_one, budget):
    engine = engine_for(max_num_batched_tokens=budget, max_num_seqs=6, enable_prefix_caching=False)
    assert engine.tokens(mixed()) == one_by_one


def test_preempted_requests_go_on_with_the_same_tokens(engine_for, one_by_one):
    engine = engine_for(num_blocks=32)
    before = engine.core.report().num_preemptions
    assert engine.tokens(mixed()) == one_by_one
    assert engine.core.report().num_preemptions > before


def test_a_cached_prefix_gives_the_same_tokens(engine_for, one_by_one):
    engine = engine_for()
    engine.tokens({"first": (PROMPTS["d"], greedy())})
    before = engine.core.report().prefix_cache_hits
    assert engine.tokens({"d": mixed()["d"]})["d"] == one_by_one["d"]
    assert engine.core.report().prefix_cache_hits > before


def test_the_same_seed_gives_the_same_text_whatever_else_is_in_the_batch(engine_for):
    request = (PROMPTS["e"], seeded(11, max_tokens=20))
    alone_ = engine_for().tokens({"x": request})["x"]
    crowd = {f"n{seed}": (PROMPTS["a"], seeded(seed, top_k=seed)) for seed in range(5)}
    among = engine_for().tokens({**crowd, "x": request, "twin": request, "other": (PROMPTS["e"], seeded(12))}, {"x": 2})
    assert among["x"] == among["twin"] == alone_
    assert among["other"] != alone_[: len(among["other"])]


def test_without_a_seed_two_requests_differ(engine_for):
    request = (PROMPTS["e"], seeded(None, top_p=1.0, max_tokens=20))
    found = engine_for().tokens({"x": request, "y": request})
    assert found["x"] != found["y"]


@pytest.mark.parametrize("budget", [7, 2048])
def test_prompt_logprobs_are_those_of_a_dense_forward(engine_for, decoder, budget):
    engine = engine_for(max_num_batched_tokens=budget, max_num_seqs=6, enable_prefix_caching=False)
    names = ("a", "d", "c")
    requests = {name: (PROMPTS[name], greedy(prompt_logprobs=3, max_tokens=2)) for name in names}
    requests["bystander"] = (PROMPTS["e"], greedy())
    found = engine.answer(requests)
    for name in names:
        prompt = PROMPTS[name]
        (logits,) = all_logits(decoder, [[prompt]])
        exact = logits.double().log_softmax(-1)
        got = found[name].prompt_logprobs or []
        assert [each.token_id for each in got] == prompt[1:]
        own = [float(exact[place, token]) for place, token in enumerate(prompt[1:])]
        assert [each.logprob for each in got] == pytest.approx(own, abs=1e-4)
        for place, each in enumerate(got):
            assert each.rank == 1 + int((logits[place] > logits[place, each.token_id]).sum())
            assert [value for _, value in each.top] == pytest.approx(exact[place].topk(3).values.tolist(), abs=1e-4)
    assert found["bystander"].prompt_logprobs is None


def test_logprobs_of_an_answer_are_those_of_a_dense_forward(engine_for, decoder):
    (answer,) = engine_for().answer({"a": (PROMPTS["a"], seeded(3, logprobs=2, ignore_eos=True))}).values()
    (logits,) = all_logits(decoder, [[PROMPTS["a"] + answer.token_ids]])
    exact = logits.double().log_softmax(-1)[len(PROMPTS["a"]) - 1 : -1]
    own = [float(row[token]) for row, token in zip(exact, answer.token_ids, strict=True)]
    assert [each.logprob for each in answer.logprobs] == pytest.approx(own, abs=1e-4)


def test_penalties_act_on_what_was_said(engine_for, decoder):
    params = greedy(
        presence_penalty=0.7, frequency_penalty=0.4, repetition_penalty=1.3, logit_bias={17: 2.0}, max_tokens=24
    )
    prompt = PROMPTS["b"]
    found = engine_for().tokens({"x": (prompt, params), "y": (prompt, greedy(max_tokens=24))})
    (logits,) = all_logits(decoder, [[prompt + found["x"]]])
    for place, token in enumerate(found["x"]):
        scores = logits[len(prompt) - 1 + place].double()
        scores[17] += 2.0
        said = found["x"][:place]
        for seen in {*prompt, *said}:
            scores[seen] = scores[seen] / 1.3 if scores[seen] > 0 else scores[seen] * 1.3
        for seen in set(said):
            scores[seen] -= 0.7 + 0.4 * said.count(seen)
        assert token == int(scores.argmax())
    assert found["x"] != found["y"]


def ends_early(engine):
    """A request that would say the end token before its tenth token, and after how many."""
    for seed in range(400):
        request = (PROMPTS["b"], seeded(seed, top_p=1.0, temperature=1.5, max_tokens=20))
        answer = engine.answer({"x": request})["x"]
        if answer.finish_reason == "stop" and 2 <= len(answer.token_ids) < 10:
            return request, answer.token_ids
    raise AssertionError("no seed says the end token")


@pytest.fixture(scope="module")
def early(engine_for):
    return ends_early(engine_for())


def with_options(request, **options):
    prompt, sampling = request
    return prompt, SamplingParams(
        **({field: getattr(sampling, field) for field in sampling.__struct_fields__} | options)
    )


def test_an_end_token_ends_the_answer_and_is_part_of_it(early):
    _, said = early
    assert said[-1] == EOS
    assert said.count(EOS) == 1


def test_ignore_eos_goes_on_past_the_end_token_and_does_not_mask_it(engine_for, early):
    request, said = early
    answer = engine_for().answer({"x": with_options(request, ignore_eos=True)})["x"]
    assert answer.token_ids[: len(said)] == said
    assert len(answer.token_ids) == 20
    assert answer.finish_reason == "length"


def test_min_tokens_bans_end_tokens_until_so_many_were_said(engine_for, early):
    request, said = early
    wanted = len(said) + 3
    answer = engine_for().answer({"x": with_options(request, min_tokens=wanted)})["x"]
    assert EOS not in answer.token_ids[:wanted]
    assert len(answer.token_ids) >= wanted


def test_min_tokens_bans_no_end_token_that_is_ignored(engine_for, early):
    request, said = early
    answer = engine_for().answer({"x": with_options(request, min_tokens=15, ignore_eos=True)})["x"]
    assert answer.token_ids[: len(said)] == said


def test_a_bias_of_minus_100_bans_a_token_and_one_of_100_forces_it(engine_for):
    (first, *_) = engine_for().tokens({"x": (PROMPTS["a"], greedy())})["x"]
    banned = engine_for().tokens({"x": (PROMPTS["a"], greedy(logit_bias={first: -100}))})["x"]
    forced = engine_for().tokens({"x": (PROMPTS["a"], greedy(logit_bias={42: 100}))})["x"]
    assert first not in banned
    assert set(forced) == {42}


def test_logits_that_are_not_finite_end_their_own_request_and_disturb_nobody_then_or_later(model):
    """One token's embedding is NaN; its blocks are used again afterwards, and nobody finds them by their prefix."""
    engine = Engine(model, 32, {})
    expected = engine.tokens({"good": (PROMPTS["a"], greedy())})["good"]
    embedding = engine.executor._worker._decoder.embedding.weight
    before = embedding[2].clone()
    with torch.inference_mode():
        embedding[2] = float("nan")
    poisoned = [2] * 41
    answers = engine.answer({"good": (PROMPTS["a"], greedy()), "bad": (poisoned, greedy(logprobs=2))})
    assert answers["bad"].finish_reason == "error"
    assert answers["bad"].token_ids == []
    assert answers["good"].token_ids == expected
    scored = engine.answer({"scored": (poisoned, greedy(prompt_logprobs=1))})["scored"]
    assert scored.finish_reason == "error"
    with torch.inference_mode():
        embedding[2] = before
    assert engine.core.scheduler.pool.num_free == 32
    many = {str(number): (PROMPTS["a"][number:], greedy()) for number in range(3)}
    assert engine.tokens(many) == {name: engine.tokens({name: many[name]})[name] for name in many}
    assert engine.answer({"again": (poisoned, greedy())})["again"].finish_reason == "length"
    engine.executor.close()
