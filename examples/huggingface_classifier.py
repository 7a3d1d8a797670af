"""A Hugging Face classifier, unmodified: its dropouts and its loss are found while it runs.

pip install transformers;  python examples/huggingface_classifier.py [--fast]

The weights are random, so nothing is downloaded; ``from_pretrained`` in the place of the two lines below is the real
thing.
"""

import argparse

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

import lightning_dropreg as dr


class SentenceClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        config = BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
            max_position_embeddings=32, num_labels=3,
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def predict_step(self, batch, batch_idx):
        return self.model(**batch).logits

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def make_loader():
    """Sentences of random words; the label is the remainder of the first."""
    words = torch.randint(5, 200, (128, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in words]
    return DataLoader(rows, batch_size=16)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="two batches only")
    fast = parser.parse_args(args).fast
    L.seed_everything(1)
    model, loader = SentenceClassifier(), make_loader()
    batch = next(iter(loader))
    for site in dr.functional.find_sites(lambda: model.train().model(**batch).loss):
        print(f"{site.name:60s} p={site.p} {site.shape}")

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 3}
    options["fast_dev_run"] = 2 if fast else False
    L.Trainer(callbacks=[dr.ExplicitPenalty(), dr.ImplicitNoise()], **options).fit(model, loader)

    draws = L.Trainer(callbacks=[dr.MonteCarloDropout(passes=16)], **options).predict(model, loader)
    entropy, information = (torch.cat([getattr(p, name) for p in draws]) for name in ("entropy", "mutual_information"))
    print(f"predictive entropy {entropy.mean():.3f} nats, of which dropout's disagreement {information.mean():.3f}")


if __name__ == "__main__":
    main()
