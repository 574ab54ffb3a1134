"""Writes docs/results.md from the rows in results/: tables are generated, never typed."""

import csv
import pathlib

RESULTS = pathlib.Path("results")
# Written by eval.whitepaper and eval.dsq.
PAGES = (
    *(f"whitepaper_table_{table}.md" for table in range(1, 8)),
    *(f"dsq_table_{table}.md" for table in range(2, 8)),
    "practice.md",
)

SECTIONS = (
    (
        "Post-training quantization beside its peers",
        "The same float models, 100 calibration images (imagenet_calibration_1000, seed 0) and 500 "
        "test images (nips17_dev_500) for every tool, in one run: `LOWBIT_DATA=folder python "
        "scripts/compare_peers.py`. Files run in the LiteRT interpreter. `minus_float` is paired, with "
        "its standard error; `seconds` are from images in memory to the bytes of the file "
        "(litert_quantizer: from a float `.tflite`). Our recipes' 4-bit codes lie in int8 tensors.",
        "ptq_peers.csv",
        (
            "model",
            "tool",
            "top1",
            "minus_float",
            "paired_error",
            "mean_kl",
            "seconds",
            "size_bytes",
        ),
    ),
    (
        "Each correction alone, and together",
        "`LOWBIT_DATA=folder python scripts/ablation.py`: 60 calibration images, "
        "`--calibrator=auto`, nips17_dev_500. `seconds` are of the first row that calibrates with the "
        "calibration, of the others without.",
        "ablation.csv",
        (
            "model",
            "scheme",
            "corrections",
            "top1",
            "minus_float",
            "paired_error",
            "mean_kl",
            "seconds",
        ),
    ),
    (
        "Precisions",
        "`LOWBIT_DATA=folder python scripts/precisions.py`: files in the default interpreter, top-1 on "
        "nips17_dev_500, `paired_error` and `mean_kl` against the converter's float file; latency in "
        "one thread, the files in turn in one run, `time_ratio` the median of each run over the float "
        "run beside it.",
        "precisions.csv",
        (
            *("model", "file", "size_bytes", "size_ratio", "top1", "minus_float", "paired_error"),
            *("mean_kl", "median_ms", "time_ratio", "faults"),
        ),
    ),
    (
        "Latency on the host",
        "`LOWBIT_DATA=folder python scripts/host_latency.py`: our files beside the peers' of the same "
        "networks, in turn in one run. `time_ratio` is the median over rounds of a file's time by that "
        "of `ratio_of` in the same round, with its 95 % interval: above 1 the file is slower. The "
        "`_copy` files are ours again, byte for byte: their distance from 1 is what the measurement "
        "can tell apart.",
        "latency.csv",
        (
            *("model", "threads", "latency_ms", "latency_ms_p10", "latency_ms_p90"),
            *("time_ratio", "time_ratio_low", "time_ratio_high", "ratio_of", "size_bytes"),
        ),
    ),
    (
        "Networks",
        "`python scripts/ten_networks.py`: placed, calibrated, exported, checked, and the simulator "
        "against XNNPACK and BUILTIN_REF on 10 images, codes that differ. Where weights are `random` "
        "their batch norms were set from images.",
        "networks.csv",
        (
            "model",
            "weights",
            "parameters",
            "size_bytes",
            "operations",
            "faults",
            "images",
            "xnnpack_differing",
            "reference_differing",
            "least_distinct",
            "outside_xnnpack",
        ),
    ),
    (
        "Parity",
        "Integer codes that differ at the output, on the first 100 images of nips17_dev_500: "
        "`python -m eval.parity --model=ptq.keras --dataset=nips17_dev_500.zip`. The simulator against "
        "the interpreter in both flavours, and the quantized Keras model against the integer graph, "
        "each operation alone, over all its codes on 4 images. The last columns are what two correct "
        "runtimes differ by on the same file.",
        "parity.csv",
        (
            "model",
            "output_codes",
            "simulator_xnnpack_differing",
            "simulator_reference_differing",
            "keras_op_codes",
            "keras_op_differing",
            "xnnpack_reference_differing",
            "xnnpack_reference_worst_lsb",
        ),
    ),
    (
        "Agreement on 500 images",
        "`python -m eval.accuracy --model=m.tflite --reference=...` on nips17_dev_500: the `.tflite` "
        "in XNNPACK against the quantized Keras model, and against itself on the reference kernels.",
        "accuracy.csv",
        (
            "model",
            "reference",
            "top1",
            "reference_top1",
            "agreement",
            "top1_difference",
            "top1_paired_error",
            "mean_kl",
            "tied_at_top",
        ),
    ),
    (
        "QAT of a real network",
        "MobileNet-v2 1.0 from its PTQ ranges on imagenette_train_5000 (10 of its 1,000 classes), "
        "measured on nips17_dev_500.",
        "qat.csv",
        ("model", "steps", "images", "top1_float", "top1_ptq", "top1_qat", "kl_qat", "seconds"),
    ),
    (
        "Speed and memory",
        "`python scripts/benchmark.py`, medians of interleaved runs in one process on 2 cores; "
        "training steps of MobileNet-v2 at 96 pixels, batch 8.",
        "benchmark.csv",
        ("what", "seconds", "ratio", "of", "limit"),
    ),
)


def main():
    """Writes one section for each table whose rows are there."""
    lines = ["# Measurements", "", "Generated by `scripts/results_page.py`.", ""]
    for title, text, name, columns in SECTIONS:
        path = RESULTS / name
        if not path.exists():
            continue
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        lines += [f"## {title}", "", text, "", "| " + " | ".join(columns) + " |"]
        lines.append("|" + "---|" * len(columns))
        lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
        lines.append("")
    for name in PAGES:
        path = RESULTS / name
        if path.exists():
            text = path.read_text().replace("# ", "## ", 1).partition("\n## Commands")[0]
            lines += [text.strip(), "", f"The commands: [{path.name}](../{path}).", ""]
    pathlib.Path("docs/results.md").write_text("\n".join(lines))


def _cell(value):
    if value in (None, ""):
        return "–"
    try:
        number = float(value)
    except ValueError:
        return pathlib.PurePath(value).name if "/" in value and " " not in value else value
    return str(int(number)) if number == int(number) and "." not in value else f"{number:.4g}"


if __name__ == "__main__":
    main()
