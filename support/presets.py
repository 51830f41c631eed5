"""Named sets of defaults, and what the record of each says. Data, nothing else. docs/experiments.md has the runs by
which they were found."""

PRESETS: dict[str, dict] = {
    "shakespeare": {
        "batch_size": 16,
        "steps": 1300,
        "optimizer": "muon",
        "lr": 2.5e-3,
        "warmup_steps": 60,
        "weight_decay": 0.0,
    },
    "adamw": {
        "batch_size": 1,
        "seq_len": 1024,
        "steps": 9000,
        "lr": 3e-5,
        "embed_lr": 3e-3,
        "weight_decay": 0.0,
        "beta1": 0.5,
        "beta2": 0.999,
    },
    "demo": {
        "input_file": "data/sample.txt",
        "out_dir": "out_demo",
        "batch_size": 1,
        "steps": 110,
        "lr": 6e-6,
        "embed_lr": 5e-3,
        "weight_decay": 0.0,
        "beta1": 0.8,
        "save_every": 100,
        "prompt": "AMBROSE:\nCome in, and shut the door",
        "temperature": 0.5,  # to recite; at 0.9 a sample soon leaves the text
    },
    "char-small": {
        "tokenizer": "char",
        "out_dir": "out_char_small",
        "val_fraction": 0.1,
        "block_size": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_embd": 64,
        "batch_size": 16,
        "seq_len": 32,
        "steps": 5000,
        "optimizer": "muon",
        "lr": 1e-2,
        "weight_decay": 0.0,
        "beta1": 0.95,
        "randomize_batches": True,
        "target_loss": 0.0,
        "best_by": "val",
        "log_every": 100,
    },
    "char-medium": {
        "tokenizer": "char",
        "out_dir": "out_char_medium",
        "val_fraction": 0.1,
        "block_size": 32,
        "n_layer": 6,
        "n_head": 6,
        "n_embd": 192,
        "batch_size": 16,
        "seq_len": 32,
        "steps": 5000,
        "optimizer": "muon",
        "lr": 5e-3,
        "weight_decay": 0.0,
        "beta1": 0.95,
        "randomize_batches": True,
        "target_loss": 0.0,
        "best_by": "val",
        "log_every": 100,
    },
    "finetune": {  # with --init_from: three passes, at a rate that changes trained weights only a little
        "out_dir": "out_finetune",
        "batch_size": 4,
        "epochs": 3,
        "lr": 3e-5,
        "weight_decay": 0.0,
    },
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},  # the shapes of the GPT-2 paper, table 2
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
}

OTHER_NAMES = {"muon": "shakespeare"}  # that commands in users' notes have

# What the record of a preset says: on which text, tokens of training until the target was met (0: there was none), and
# seconds until the run had ended.
RECORDS: dict[str, dict] = {
    "demo": {
        "what": "the bundled play, known by heart",
        "record": "records/demo",
        "sha256": "1146f70aef9838574e107e4aee1fe90a1288fa20fdfca8f51790384e63939e86",
        "tokens": 21_760,
        "seconds": 59,
    },
    "char-small": {
        "what": "a small model of characters that learns tiny Shakespeare",
        "record": "records/char-small",
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "tokens": 0,
        "seconds": 109,
    },
    "shakespeare": {
        "what": "GPT-2 124M that knows tiny Shakespeare by heart",
        "record": "records/shakespeare",
        "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        "tokens": 3_743_744,
        "seconds": 7_735,
    },
}
MACHINE = "two CPU cores with native bf16"  # that the records are from
