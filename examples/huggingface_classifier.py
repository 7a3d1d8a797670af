"""A Hugging Face classifier, unmodified: its dropouts and its loss are found while it runs.

pip install transformers scikit-learn matplotlib;  python examples/huggingface_classifier.py [--fast] [--figure F.png]

A digit is read as a sentence of 16 words, one for each patch of four pixels, in 17 shades. The weights are random, so
nothing is downloaded; ``from_pretrained`` in the place of the configuration is the real thing.

Ten classes: chance is 0.10. So short a training underfits, and a penalty does not help a net that underfits: dropout
does better here.
"""

import argparse

import lightning as L
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import lightning_dropreg as dr


class DigitReader(L.LightningModule):
    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=17, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
            max_position_embeddings=16, num_labels=10,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def predict_step(self, batch, batch_idx):
        return self.model(**batch).logits

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def make_rows():
    """1,000 digits to train with, 797 to test."""
    digits = load_digits()
    patches = torch.tensor(digits.images).reshape(-1, 4, 2, 4, 2).mean((2, 4))
    words, labels = patches.round().long().flatten(1), torch.tensor(digits.target)
    rows = [{"input_ids": row, "labels": label} for row, label in zip(words, labels, strict=True)]
    return rows[:1000], rows[1000:], labels[1000:]


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    parser.add_argument("--figure", default="huggingface_classifier.png", help="where to write the picture")
    given = parser.parse_args(args)
    train, test, labels = make_rows()
    loader, test_loader = DataLoader(train, batch_size=50, shuffle=True), DataLoader(test, batch_size=400)
    batch, model = next(iter(loader)), DigitReader().train()
    for site in dr.functional.find_sites(lambda: model.model(**batch).loss):
        print(f"{site.name:60s} p={site.p} {site.shape}")

    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "max_epochs": 25, "fast_dev_run": 2 if given.fast else False, **quiet}
    for name, callbacks in (("dropout", []), ("penalty", [dr.ExplicitPenalty(batch_fraction=0.25)])):
        L.seed_everything(1, verbose=False)
        reader = DigitReader()
        L.Trainer(callbacks=callbacks, **options).fit(reader, loader)
        logits = torch.cat(L.Trainer(**options).predict(reader, test_loader))
        target = labels[: len(logits)]
        loss, accuracy = torch.nn.functional.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
        print(f"{name}: test loss {loss:.3f}, accuracy {accuracy:.3f} (chance 0.10)")

    draws = L.Trainer(callbacks=[dr.MonteCarloDropout(passes=16)], **options).predict(reader, test_loader)
    entropy, right = torch.cat([p.entropy for p in draws]), torch.cat([p.mean for p in draws]).argmax(1) == target
    print(f"predictive entropy where right {entropy[right].mean():.3f}, where wrong {entropy[~right].mean():.3f} nats")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    shares = {"right": (entropy[right], "#0072B2"), "wrong": (entropy[~right], "#D55E00")}
    for name, (values, color) in shares.items():
        axes.hist(values, bins=20, range=(0, 2.31), density=len(values) > 1, color=color, alpha=0.5, label=name)
    axes.set(xlabel="predictive entropy, nats (16 draws)", ylabel="density", title="Entropy of test digits by answer")
    axes.legend(frameon=False)
    figure.savefig(given.figure, dpi=120)


if __name__ == "__main__":
    main()
