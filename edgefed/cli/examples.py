"""Examples of each verb, for ``--help`` and the reference page: a comment and a command."""

from __future__ import annotations

from collections.abc import Sequence

EXAMPLES: dict[str, Sequence[tuple[str, str]]] = {
    "backup": (("A copy of a run, also while it is served.", "edgefed backup --state ./run ./backups/monday"),),
    "bench": (
        ("About 30 seconds, for the usual models.", "edgefed bench --quick"),
        ("What fits into 8 GiB of this model?", "edgefed bench --model Qwen3-30B-A3B --memory 8GiB --quick"),
        ("Plan for another device; nothing is measured.", "edgefed bench --device-profile jetson-orin-nano-8gb"),
    ),
    "demo": (
        ("A federation of four clients, in about a minute and a half.", "edgefed demo"),
        ("All methods on the same data.", "edgefed demo --compare"),
        ("Clients with models of their own.", "edgefed demo --method fedmoe"),
    ),
    "doctor": (
        ("Check this device.", "edgefed doctor"),
        ("Also the way to a server.", "edgefed doctor --server http://192.168.1.5:8470"),
    ),
    "clients": (
        ("Who has joined?", "edgefed clients list --state ./run"),
        ("Refuse a device from now on.", "edgefed clients ban laptop --state ./run"),
    ),
    "invite": (
        ("A join link for one device, valid for a week.", "edgefed invite --state ./run --label Ada"),
        ("For a class of thirty, today.", "edgefed invite --state ./run --uses 30 --expires 12h"),
    ),
    "chat": (
        ("Talk to an exported model.", "edgefed chat ./model"),
        ("One answer, from the newest model of a run.", 'edgefed chat ./run --prompt "Name three colours."'),
        ("Continue plain text.", 'edgefed chat ./model --raw --prompt "def area("'),
    ),
    "export": (
        ("The newest model of a run.", "edgefed export --state ./run ./model"),
        ("The same from another machine.", "edgefed export http://192.168.1.5:8470 ./model"),
        ("What this device has.", "edgefed export --state ./me ./model"),
        ("The model before round 3.", "edgefed export --state ./run --round 3 ./model"),
        ("The adapters alone, for PEFT.", "edgefed export --state ./run --to peft ./adapter"),
        ("For llama.cpp, in 8 bits.", "edgefed export --state ./run --to gguf --dtype q8_0 ./model"),
        ("For onnxruntime.", "edgefed export --state ./run --to onnx ./model"),
    ),
    "join": (
        ("Train on a file.", "edgefed join http://192.168.1.5:8470 --data my.jsonl --state ./me"),
        ("What would this device do in the run? Nothing is trained.",
         "edgefed join --dry-run http://192.168.1.5:8470 --data my.jsonl"),
        ("Within limits.", "edgefed join http://192.168.1.5:8470 --data my.jsonl --memory 2GiB --experts 25%"),
        ("With a model of your own (FedMoE).",
         "edgefed join http://192.168.1.5:8470 --task images --data my.npz --model cnn3"),
    ),
    "partition": (
        ("Two classes for each of ten clients.", "edgefed partition all.npz --clients 10 --out parts"),
        ("Unequal shares of every class.", "edgefed partition all.csv --clients 10 --by dirichlet --out parts"),
    ),
    "predict": (
        ("Classify texts with the model of this device.", 'edgefed predict --state ./me "a great film"'),
        ("Its accuracy on labelled examples.", "edgefed predict --state ./me --data test.npz"),
    ),
    "profile": (
        ("Which experts of the tiny model does this text use?", "edgefed profile --data my.jsonl"),
        ("Of a checkpoint, with a picture.", "edgefed profile --model ./olmoe --data my.jsonl --plot experts.png"),
    ),
    "serve": (
        ("Wait for two clients, then train five rounds.",
         "edgefed serve --model tiny --rounds 5 --min-clients 2 --state ./run"),
        ("For other machines; clients join with the same `--token @token.txt`.",
         "edgefed serve --host 0.0.0.0 --token @token.txt --model ./olmoe --train-experts lora"),
        ("Continue a run.", "edgefed serve --state ./run"),
    ),
    "simulate": (
        ("Run a fleet; the same command continues it.", "edgefed simulate fleet.toml --out results"),
        ("One of its methods.", "edgefed simulate fleet.toml --method flux --rounds 10"),
    ),
    "status": (
        ("The run on this machine.", "edgefed status"),
        ("Until it ends.", "edgefed status http://192.168.1.5:8470 --watch"),
    ),
}  # fmt: skip
