"""Latency on this machine beside the peers' files of the same networks, in turn in one run.

    LOWBIT_DATA=folder python scripts/host_latency.py --files=runs/host
    LOWBIT_DATA=folder python scripts/host_latency.py --files=runs/host --make_only   # an hour before

Files that --files has not are made into it: ours (NAME.int8.tflite, NAME.float.tflite) and, in its
folder peers, the converter's and litert_quantizer's, all from one float model and the same 100
calibration images.  For each network two runs of eval/on_host.py: our int8 file beside our float one
and the peers' int8, and our float file beside the converter's.  Rows go to results/latency.csv.
"""

import argparse
import os
import pathlib
import sys

import compare_peers
import peers

from eval import on_host
from lowbit import files, lowering, results, tflite_file
from lowbit.data import datasets

# file name: model of LOWBIT_DATA
NETWORKS = {
    "mobilenet_v1": "mobilenet_v1_1.0_224",
    "mobilenet_v2": "mobilenet_v2_1.0_224",
    "efficientnet_lite0": "efficientnet_lite0_224",
}
OURS = {"int8": ("w8a8", "fast"), "float": ("float32", "plain")}


def main():
    """Makes what is missing, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", default="runs/host", help="folder of the .tflite files")
    parser.add_argument("--models", default=",".join(NETWORKS))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--runs", type=int, default=250, help="counted, of each file")
    parser.add_argument("--images", type=int, default=100, help="for calibration")
    parser.add_argument("--make_only", action="store_true", help="make files, measure nothing")
    parser.add_argument("--output_dir", default="results")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    made = {name: make(name, arguments) for name in names}
    if arguments.make_only:
        return
    rows = []
    for name, path in made.items():
        for model, beside in (
            ("int8", ("int8_copy", "float", "converter", "litert_quantizer")),
            ("float", ("float_copy", "converter_float")),
        ):
            measured = on_host.measure(
                path[model],
                beside=",".join(path[other] for other in beside),
                threads=arguments.threads,
                runs=arguments.runs,
                output_dir=arguments.output_dir,
            )
            rows += table_rows(name, measured)
    columns = ["network", "threads", "file", "latency_ms", "latency_ms_p10", "latency_ms_p90"]
    columns += ["size_bytes", "time_ratio", "time_ratio_low", "time_ratio_high", "ratio_of"]
    print(results.table(rows, columns))
    slower = [row for row in rows if is_faster(row, rows)]
    for row in slower:
        print(f"{row['network']}, {row['threads']} threads: {row['file']} is faster than ours")
    sys.exit(bool(slower))


def is_faster(row, rows):
    """Returns whether a file's interval lies below 1, and below that of the copy of ours beside it."""
    if "time_ratio" not in row or "_copy." in row["file"]:
        return False
    key = ("network", "threads", "ratio_of")
    (copy,) = (
        other
        for other in rows
        if "_copy." in other["file"] and all(other[name] == row[name] for name in key)
    )
    return row["time_ratio_high"] < min(1, copy["time_ratio_low"])


def make(name, arguments):
    """Returns the path of each file of a network; those that are absent are made."""
    folder = pathlib.Path(arguments.files)
    path = {kind: folder / f"{name}.{kind}.tflite" for kind in OURS}
    for kind in ("converter", "converter_float", "litert_quantizer", "int8_copy", "float_copy"):
        path[kind] = folder / "peers" / f"{name}.{kind}.tflite"
    missing = [kind for kind in path if not path[kind].exists() and "_copy" not in kind]
    if missing:
        (folder / "peers").mkdir(parents=True, exist_ok=True)
        data = pathlib.Path(os.environ["LOWBIT_DATA"])
        images_path = data / "images/imagenet_calibration_1000.zip"
        model, _, images = compare_peers.load(
            NETWORKS[name], data, datasets.open_dataset(images_path), arguments.images
        )
        makers = {
            kind: lambda how=how: tflite_file.write(
                lowering.lower(compare_peers.quantize(model, images, *how))
            )
            for kind, how in OURS.items()
        } | {
            "converter": lambda: peers.converter_ptq(model, images),
            "converter_float": lambda: peers.float_tflite(model),
            "litert_quantizer": lambda: peers.litert_quantizer_ptq(
                path["converter_float"].read_bytes(), images
            ),
        }
        for kind in missing:
            print(f"making {path[kind]}", file=sys.stderr)
            files.save_bytes(makers[kind](), path[kind])
    for kind in OURS:
        files.save_bytes(path[kind].read_bytes(), path[f"{kind}_copy"])
    return {kind: str(each) for kind, each in path.items()}


def table_rows(name, measured):
    """Returns a row for each file and number of threads of one run."""
    rows = []
    for entry in measured["all"]:
        ratio = measured["ratios"].get(entry["model"], {}).get(str(entry["threads"]))
        if ratio is not None:
            ratio = ratio | {"ratio_of": pathlib.Path(measured["model"]).name}
        file = pathlib.Path(entry["model"]).name
        rows.append({"network": name, "file": file} | entry | (ratio or {}))
    return rows


if __name__ == "__main__":
    main()
