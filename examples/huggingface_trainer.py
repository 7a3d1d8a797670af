"""Algorithm 2 in Hugging Face's own Trainer: a dozen lines around its `compute_loss`.

pip install transformers accelerate;  python examples/huggingface_trainer.py [--fast]

The weights are random, so nothing is downloaded; ``from_pretrained`` is the real thing.
"""

import argparse

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lightning_dropreg.functional import regularize


class RegularizedTrainer(Trainer):
    """Trains with loss, penalty and noise in the place of dropout; evaluation is as always.

    What `Trainer` makes of the loss (accumulation, ``num_items_in_batch``, mixed precision) is in it before its
    curvature is taken. Its ``label_smoothing_factor`` computes a loss by hand and is refused: smooth in the model's.
    """

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        outputs = None

        def closure():
            nonlocal outputs
            # a copy, because the Trainer takes things out of it
            loss, outputs = super(RegularizedTrainer, self).compute_loss(model, dict(inputs), True, **kwargs)
            return loss

        found = regularize(closure, strength=1.0, module=self.accelerator.unwrap_model(model))
        return (found.total, outputs) if return_outputs else found.total


def make_rows(count=128):
    """Texts in which every word names the next but for one in five; they differ in length, so padding is ignored."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        first, length = torch.randint(200, (2,), generator=g).tolist()
        words = (first + 7 * torch.arange(16)) % 200
        words[torch.rand(16, generator=g) < 0.2] = 3
        labels = words.clone()
        labels[4 + length % 12 :] = -100
        rows.append({"input_ids": words, "labels": labels})
    return rows


def make_model():
    config = GPT2Config(vocab_size=200, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    torch.manual_seed(1)
    settings = TrainingArguments(
        output_dir="trained",
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        bf16=True,
        use_cpu=True,
        num_train_epochs=3,
        max_steps=1 if fast else -1,
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = RegularizedTrainer(make_model(), settings, train_dataset=make_rows(), eval_dataset=make_rows(32))
    print(f"training loss {trainer.train().training_loss:.4f} (penalty included)")
    print(f"evaluation loss {trainer.evaluate()['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
