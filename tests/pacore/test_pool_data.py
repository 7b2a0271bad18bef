"""Prompts from pools: the same for a seed and a draw, resumed exactly, in the band, with as many messages as told."""

from itertools import islice

import pytest

from step3vl.data import Processor
from step3vl.data.loader import ResumableLoader
from step3vl.data.shards import write_shards
from step3vl.evaluation import Case
from step3vl.evaluation.answers import prompt_hash
from step3vl.pacore import SynthesisTemplate, passed_on
from step3vl.pacore.pool import Cases, PooledMessage, PooledProblem, append, build_pool, read_pool
from step3vl.pacore.pool_data import PoolData, PoolMixture, PoolSource
from step3vl.types import Completion, Message, Prompt, Sampling
from tests.pacore.answering import Notes
from tests.stages.rl_run import tiny_vlm

SAMPLING = Sampling(max_new_tokens=8, temperature=1.0, seed=1)


def processor():
    vlm = tiny_vlm()
    return Processor(template="chat").bind(vlm.image_spec, vlm.projector.grid)


def pool(folder, corpus, num=6, subset="documents-digits-level0", split="train"):
    """A pool whose problem number k has k right messages of `num`."""
    cases = Cases.of_shards(f"{corpus}/{split}/{subset}-*.tar")
    golds = {}

    def places():
        for number, (case, place) in enumerate(original):
            golds[case.prompt.messages[-1].content, prompt_hash(case.prompt)] = (case.answer, number % (num + 1))
            yield case, place

    original, cases.places = cases.places, places()

    def say(prompt, sampling, k):
        gold, num_right = golds[prompt.messages[-1].content, prompt_hash(prompt)]
        return gold if k < num_right else f"no{k}"

    build_pool(folder / "pool.jsonl", cases, Notes(say), SAMPLING, "weights", num)
    return folder / "pool.jsonl"


def data(folder, least=2, most=5, low="0", high="1", seed=0, tokens=400, prompts=4, **more):
    source = PoolSource(pool="pool.jsonl", low=low, high=high)
    made = PoolData(str(folder), {"digits": source}, prompts, 5, tokens, least, most, "short", seed=seed, **more)
    made.connect(processor())
    made.setup("fit")
    return made


def seen(batch):
    return [(s.id, s.asked.messages[-1].content, [m.text for m in s.shown]) for s in batch.samples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_corpus):
    made = tmp_path_factory.mktemp("pools")
    pool(made, small_corpus)
    return made


def test_a_prompt_shows_some_messages_and_keeps_problem_answer_and_images(folder):
    problems = {p.id: p for p in read_pool(folder / "pool.jsonl")}
    template, sizes = SynthesisTemplate("short"), set()
    for batch in islice(data(folder).train_dataloader(), 5):
        assert len(batch.samples) == 4 and not batch.skipped
        for sample in batch.samples:
            problem = problems[sample.id]
            texts = [m.text for m in sample.shown]
            sizes.add(len(texts))
            pooled = [m.text for m in problem.messages]
            assert all(texts.count(text) <= pooled.count(text) for text in texts)
            original = Prompt(
                messages=[Message(role=r, content=c) for r, c in problem.conversation], images=sample.images
            )
            assert sample.asked == template.prompt(original, texts)
            case = Case.from_sample(sample)  # what rewards see: the problem as it is
            assert case.prompt == original and case.answer == problem.answer
            assert prompt_hash(case.prompt) == problem.prompt and len(sample.asked.images) == 1
            said = [Completion(text=text, token_ids=[], truncated=False) for text in texts]
            again = [texts[k] for k in passed_on(said)]
            assert sorted(again) == sorted(texts)
    assert sizes == {2, 3, 4, 5}


def test_messages_stand_in_the_order_in_which_inference_passes_them_on(folder):
    made = data(folder, least=6, most=6)
    for sample in next(iter(made.train_dataloader())).samples:
        problem = next(p for p in read_pool(folder / "pool.jsonl") if p.id == sample.id)
        said = [Completion(text=m.text, token_ids=[], truncated=False) for m in problem.messages]
        assert [m.text for m in sample.shown] == [said[k].text for k in passed_on(said)]


def test_the_number_of_messages_is_drawn_evenly(folder):
    batches = data(folder).batches
    counts = [0] * 6
    for number in range(2000):
        problem = batches.pools.problem(("digits", number))
        counts[len(batches._drawn(problem, ("digits", number)))] += 1
    assert counts[:2] == [0, 0] and all(430 < count < 570 for count in counts[2:])


def test_draws_depend_on_seed_and_number_alone(folder):
    def run(**more):
        return [seen(b) for b in data(folder, **more).train_dataloader()]

    first = run()
    assert first == run() and first != run(seed=1)
    assert first == run(num_workers=2)
    made = data(folder)
    loader = made.train_dataloader()
    (batch, *_) = list(loader)
    for draw, sample in zip(batch.draws, batch.samples):  # as a waiting group is read again
        assert made.batches.read(draw).asked == sample.asked
    visits = {}
    for step in first:
        for id, text, _ in step:
            visits.setdefault(id, set()).add(text)
    assert max(map(len, visits.values())) > 1, "a later visit must show other messages"


@pytest.mark.parametrize("num_before", [1, 3, 5, 7])
def test_a_loader_goes_on_where_it_stopped(folder, num_before):
    def endless(loader):
        while True:
            yield from loader

    whole = [seen(b) for b in islice(endless(data(folder).train_dataloader()), 12)]
    loader = data(folder).train_dataloader()
    assert isinstance(loader, ResumableLoader)
    first = [seen(b) for b in islice(endless(loader), num_before)]
    fresh = data(folder).train_dataloader()
    fresh.load_state_dict(loader.state_dict())
    assert first + [seen(b) for b in islice(endless(fresh), 12 - num_before)] == whole


@pytest.mark.parametrize(
    ("low", "high", "kept"), [("0", "1", {1, 2, 3, 4, 5}), ("0", "3/6", {1, 2}), ("0.5", "0.99", {4, 5})]
)
def test_only_problems_in_the_band_are_asked(folder, low, high, kept):
    batches = data(folder, low=low, high=high).batches
    accuracies = {round(6 * p.accuracy) for p in batches.pools.problems["digits"]}
    assert accuracies == kept
    drawn = [batches.read(("digits", k)) for k in range(batches.mixture.num_samples("digits"))]
    assert len({s.id for s in drawn}) == len(drawn) == len(batches.pools.problems["digits"])


def test_what_does_not_fit_is_dropped_from_the_longest(tmp_path):
    messages = [PooledMessage(text=text, score=float(k == 0)) for k, text in enumerate(("1", "22 " * 60, "333", "44"))]
    prompt = Prompt(messages=[Message(role="user", content="How many?")])
    problem = PooledProblem(
        id="p",
        source={"released": "x"},
        conversation=[["user", "How many?"]],
        prompt=prompt_hash(prompt),
        num_images=0,
        answer="1",
        answer_type="exact",
        messages=messages,
    )
    append(tmp_path / "pool.jsonl", problem)
    (sample, *_) = next(iter(data(tmp_path, least=4, most=4, tokens=60).train_dataloader())).samples
    assert sorted(m.text for m in sample.shown) == ["1", "333", "44"] and sample.num_dropped == 1
    batch = next(iter(data(tmp_path, least=4, most=4, tokens=8).train_dataloader()))
    assert not batch.samples and "max_prompt_tokens" in batch.skipped[0]
    batch = next(iter(data(tmp_path, least=5, most=6).train_dataloader()))
    assert batch.skipped == ["digits/p: has 4 messages and data.least_messages is 5"] * 4


def test_another_image_than_the_pools_is_left_out_and_named(tmp_path, small_corpus):
    from step3vl.data.shards import ShardReader, find_shards

    shards = tmp_path / "train"
    (path, *_) = find_shards(f"{small_corpus}/train/documents-digits-level0-*.tar")
    reader = ShardReader(path)
    samples = [reader.read(i) for i in range(4)]
    write_shards(samples, shards, "documents-digits-level0", 10)
    pool(tmp_path, tmp_path)
    (images,) = zip(*[sample.images for sample in samples])
    for sample, image in zip(samples, (*images[1:], images[0])):
        sample.images = [image]
    write_shards(samples, shards, "documents-digits-level0", 10)
    batch = next(iter(data(tmp_path).train_dataloader()))
    assert not batch.samples and all("are not those that the pool was made with" in text for text in batch.skipped)


def test_mistakes_are_sentences(folder, tmp_path):
    with pytest.raises(ValueError, match="there is no pool"):
        PoolMixture(tmp_path, {"a": PoolSource(pool="none.jsonl")})
    with pytest.raises(ValueError, match=r"sources.a: none of the 24 problems in .* between 0.9 and 0.91"):
        PoolMixture(folder, {"a": PoolSource(pool="pool.jsonl", low="0.9", high="0.91")})
    with pytest.raises(ValueError, match="least_messages is 3 and most_messages 2"):
        data(folder, least=3, most=2)
    with pytest.raises(ValueError, match=r"sources.a.weight must be above 0"):
        PoolMixture(folder, {"a": PoolSource(pool="pool.jsonl", weight=0.0)})
