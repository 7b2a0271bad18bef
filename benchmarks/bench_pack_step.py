"""One decoder training step on 48 long-tailed documents: packed with attention per document, against its peers.

Peers run transformers' own Qwen3 with equal weights and the same loss (rows without a label dropped): padded eight to
a batch, packed rows with the mask that transformers makes from positions, and with a dense mask that it is given. TRL's
SFTTrainer, which packs too, runs where it is installed, with its own loss. Process CPU time, one thread, fp32, variants
by turns. A variant counts only if its gradients are those of documents one by one. Run: make bench
"""

from __future__ import annotations

import os
import time

import pytest
import torch
from gate import abstain, interleaved, ratio
from torch import Tensor, nn

from step3vl.data.malloc import keep_freed_memory
from step3vl.data.packing import Packer
from step3vl.losses import CrossEntropy
from step3vl.models import Qwen3Decoder
from step3vl.types import IGNORE_INDEX, Batch

NUM_DOCUMENTS, MEDIAN, LONGEST, GROUP = 48, 180, 2048, 8
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
}
TOLERANCE = 1e-5
"""Of all gradients together, relative to their norm."""
PEERS = ("padded", "padded, sorted by length", "packed, mask from positions", "packed, dense mask")
OURS, WRONG = "packed, per document (ours)", "packed, no document mask (wrong)"


class Step:
    """The documents, our decoder and transformers' with the same weights; `step(variant)` is one training step."""

    def __init__(self) -> None:
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.set_num_threads(1)
        keep_freed_memory()  # for all variants
        torch.manual_seed(0)
        quantiles = (torch.arange(NUM_DOCUMENTS) + 0.5) / NUM_DOCUMENTS
        lengths = (
            (MEDIAN * torch.special.ndtri(quantiles).exp()).long().clamp(8, LONGEST)[torch.randperm(NUM_DOCUMENTS)]
        )
        self.documents = [torch.randint(0, SIZES["vocab_size"], (n,)) for n in lengths.tolist()]
        self.num_tokens = sum(map(len, self.documents))
        self.ours = Qwen3Decoder(**SIZES)
        config = Qwen3Config(
            vocab_size=SIZES["vocab_size"],
            hidden_size=SIZES["hidden_size"],
            intermediate_size=SIZES["intermediate_size"],
            num_hidden_layers=SIZES["num_layers"],
            num_attention_heads=SIZES["num_heads"],
            num_key_value_heads=SIZES["num_kv_heads"],
            head_dim=SIZES["head_dim"],
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            attn_implementation="sdpa",
        )
        self.theirs = Qwen3ForCausalLM(config)
        missing, unexpected = self.theirs.load_state_dict(self.ours.state_dict(), strict=False)
        assert not missing and not unexpected
        self.optimizers = {id(m): torch.optim.AdamW(m.parameters(), lr=0.0) for m in (self.ours, self.theirs)}
        self.loss = CrossEntropy()
        packer, self.rows = Packer(LONGEST), []
        for number in sorted(range(NUM_DOCUMENTS), key=lambda i: -len(self.documents[i])):  # best fit, longest first
            self.rows += packer.add(number, len(self.documents[number])) or []
        self.rows += [items for _, _, items in packer.state_dict()["open"]]

    def __call__(self, variant: str) -> float:
        """Forward and backward of all documents, the mean loss of all labels, and AdamW with a rate of 0."""
        model = self.ours if variant == OURS else self.theirs
        self.optimizers[id(model)].zero_grad()
        total = 0.0
        for batch, mask in self.batches(variant):
            hidden = self.hidden(variant, batch, mask)
            loss = self.loss(hidden, model.lm_head, batch).value / (self.num_tokens - NUM_DOCUMENTS)
            loss.backward()
            total += float(loss.detach())
        self.optimizers[id(model)].step()
        return total

    def hidden(self, variant: str, batch: Batch, mask: Tensor | None) -> Tensor:
        if variant == OURS:
            return self.ours(self.ours.embed(batch.input_ids), batch.position_ids)
        positions = batch.position_ids if variant.startswith("packed") else None
        output = self.theirs.model(batch.input_ids, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.last_hidden_state

    def batches(self, variant: str) -> list[tuple[Batch, Tensor | None]]:
        if variant == "one by one":
            return [(padded([document]), None) for document in self.documents]
        if variant.startswith("padded"):
            order = sorted(self.documents, key=len) if "sorted" in variant else self.documents
            groups = [padded(order[i : i + GROUP]) for i in range(0, len(order), GROUP)]
            return [(batch, batch.loss_weights.bool()) for batch in groups]
        rows = [packed([[self.documents[i] for i in row]]) for row in self.rows]  # one a time: no larger masks
        if variant == OURS:
            return [(packed([[self.documents[i] for i in row] for row in self.rows]), None)]
        if variant == WRONG:
            return [(row, torch.ones_like(row.input_ids)) for row in rows]  # a plain mask is causal over all the row
        return [(row, block_mask(row.position_ids) if "dense" in variant else None) for row in rows]

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def packed(rows: list[list[Tensor]]) -> Batch:
    """Rows of documents end to end, padded on the right to the longest row with a document without labels."""
    width = max(sum(map(len, row)) for row in rows)
    spare = [torch.zeros(width - sum(map(len, row)), dtype=torch.long) for row in rows]
    rows = [[*row, rest] for row, rest in zip(rows, spare)]
    labels = [[torch.cat([d[1:], d.new_tensor([IGNORE_INDEX])]) for d in row[:-1]] for row in rows]
    return Batch(
        input_ids=torch.stack([torch.cat(row) for row in rows]),
        labels=torch.stack([torch.cat([*x, torch.full_like(rest, IGNORE_INDEX)]) for x, rest in zip(labels, spare)]),
        loss_weights=torch.ones(len(rows), width),
        position_ids=torch.stack([torch.cat([torch.arange(len(d)) for d in row]) for row in rows]),
    )


def padded(documents: list[Tensor]) -> Batch:
    """One document a row; the weights are 1 at its tokens and 0 at padding."""
    batch = packed([[document] for document in documents])
    lengths = torch.tensor([len(document) for document in documents])
    batch.loss_weights = (torch.arange(batch.input_ids.shape[1]) < lengths[:, None]).float()
    return batch


def block_mask(position_ids: Tensor) -> Tensor:
    """[1,1,T,T] True where a token of one document sees an earlier one of the same, or itself."""
    document = position_ids.eq(0).cumsum(-1)[0]
    return (document[:, None].eq(document) & torch.ones(len(document), len(document), dtype=torch.bool).tril())[
        None, None
    ]


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference of all gradients over the norm of the wanted ones."""
    assert found.keys() == wanted.keys()
    squares = [
        ((found[name] - wanted[name]).double().square().sum(), wanted[name].double().square().sum()) for name in wanted
    ]
    return float(torch.stack([a for a, _ in squares]).sum().sqrt() / torch.stack([b for _, b in squares]).sum().sqrt())


@pytest.fixture(scope="module")
def step() -> Step:
    return Step()


@pytest.fixture(scope="module")
def wanted(step) -> dict[str, Tensor]:
    step("one by one")
    return step.gradients(step.theirs)


def check(step: Step, wanted: dict[str, Tensor], variant: str) -> float:
    step(variant)
    return distance(step.gradients(step.ours if variant == OURS else step.theirs), wanted)


@pytest.mark.parametrize("variant", [*PEERS, OURS])
def test_pack_step(benchmark, step, wanted, variant):
    error = check(step, wanted, variant)
    print(f"\n{variant}: gradients off by {error:.1e}")
    assert error < TOLERANCE
    benchmark.group = f"decoder step, {NUM_DOCUMENTS} documents, {step.num_tokens:,} tokens, CPU seconds"
    benchmark.pedantic(step, args=(variant,), rounds=3, warmup_rounds=1)


def test_without_a_document_mask_the_gradient_is_wrong(step, wanted):
    """Only the gradient tells: the loss moves by less than a percent."""
    error = check(step, wanted, WRONG)
    right, wrong = step(OURS), step(WRONG)
    print(f"\nwithout document mask: loss {wrong:.3f} for {right:.3f}, gradients off by {error:.0%}")
    assert abs(wrong / right - 1) < 0.01
    assert error > 1000 * TOLERANCE


def test_3_5_times_padding(step, wanted):
    assert max(check(step, wanted, variant) for variant in (*PEERS, OURS)) < TOLERANCE
    seconds = interleaved({variant: lambda v=variant: step(v) for variant in (*PEERS, OURS)})
    slots = sum(batch.input_ids.numel() for batch, _ in step.batches("padded"))
    print(f"\npadding in the order they came: {1 - step.num_tokens / slots:.0%} of token slots")
    found = {variant: ratio(seconds, variant, OURS) for variant in PEERS}
    abstain(seconds)
    assert found["padded"] >= 3.5


def test_1_5_times_trl_packing(step, wanted, tmp_path):
    """TRL's packing with each of its settings for a batch: all rows flattened into one, and a row at a time."""
    pytest.importorskip("trl", reason="TRL is not installed")
    train = {size: trl_epoch(step, tmp_path, size) for size in (len(step.rows), 1)}
    names = {f"TRL bfd, {size} rows a batch": run for size, run in train.items()}
    step(OURS)
    for name, run in names.items():
        error = distance(run()[1], wanted)
        print(f"\n{name}: gradients off by {error:.1e}")
        assert error < TOLERANCE
    seconds: dict[str, list[float]] = {name: [] for name in (*names, OURS)}
    for number in range(6):
        for name, run in names.items():
            value = run()[0]
            seconds[name] += [value] if number else []
        start = time.process_time()
        step(OURS)
        seconds[OURS] += [time.process_time() - start] if number else []
    found = {name: ratio(seconds, name, OURS) for name in names}
    print(
        {name: f"{step.num_tokens / sorted(values)[2]:,.0f} tokens per CPU second" for name, values in seconds.items()}
    )
    abstain(seconds)
    assert min(found.values()) >= 1.5


def trl_epoch(step: Step, folder, rows_per_batch: int):
    """A function that trains one epoch, which is one optimizer step; returns CPU seconds of the epoch and gradients."""
    import datasets
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    os.environ["HF_HUB_OFFLINE"] = "1"

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *args, **kwargs):
            self.start = time.process_time()

        def on_pre_optimizer_step(self, *args, **kwargs):
            now = time.process_time()
            self.gradients = step.gradients(step.theirs)
            self.start += time.process_time() - now  # the copy is ours, not TRL's

        def on_epoch_end(self, *args, **kwargs):
            self.seconds = time.process_time() - self.start

    config = SFTConfig(
        output_dir=str(folder),
        packing=True,
        packing_strategy="bfd",
        max_length=LONGEST,
        per_device_train_batch_size=rows_per_batch,
        gradient_accumulation_steps=len(step.rows) // rows_per_batch,
        num_train_epochs=1,
        learning_rate=1e-30,  # 0 would be taken for no training
        weight_decay=0.0,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>", eos_token="<pad>"
    )
    data = datasets.Dataset.from_dict({"input_ids": [d.tolist() for d in step.documents]})
    clock = Clock()

    def run():
        trainer = SFTTrainer(step.theirs, config, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
        assert len(trainer.train_dataset) == len(step.rows), f"TRL made {len(trainer.train_dataset)} rows"
        trainer.train()
        assert trainer.state.global_step == 1
        return clock.seconds, clock.gradients

    return run
