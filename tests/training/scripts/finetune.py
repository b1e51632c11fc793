"""Fine-tunes an adapter of a text classifier with a Trainer, as thousands of scripts do."""

import argparse
import json

from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True)
parser.add_argument("--adapter", required=True)
parser.add_argument("--data", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--labels", type=int, default=3)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
base = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=args.labels)
model = PeftModel.from_pretrained(base, args.adapter, is_trainable=True)

with open(args.data, encoding="utf-8") as lines:
    rows = [json.loads(line) for line in lines]
examples = [{**tokenizer(row["text"]), "labels": row["label"]} for row in rows]

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.out,
        max_steps=6,
        optim="sgd",
        per_device_train_batch_size=4,
        learning_rate=2.0,
        seed=11,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    ),
    train_dataset=examples,
    data_collator=DataCollatorWithPadding(tokenizer),
)
trainer.train()
model.save_pretrained(args.out)
