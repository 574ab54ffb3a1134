"""Learning curves of four ways to train 4-bit weights from pictures without labels.

    LOWBIT_DATA=folder python scripts/four_bits.py

MobileNet-v1 0.25, w4a8, from the best PTQ start, on the calibration pictures (600 of 1,000) and
imagenette; every 20 steps the mean KL to float on the other 400 calibration pictures.  Runs lie in
runs/four_bits and go on where they were; rows go to results/four_bits.csv, the picture to
docs/four_bits.png.  What the curves say is in docs/qat.md.
"""

import csv
import io
import os
import pathlib
import zipfile

import numpy as np

from eval import processes
from lowbit import files, plots, results

STEPS = 200
CALIBRATION = "images/imagenet_calibration_1000.zip"
COMMON = (
    *("--scheme=w4a8", "--distill", "--range_mode=frozen", "--batch_size=24", f"--steps={STEPS}"),
    *("--optimizer=adam", "--rate_unit=step", "--warmup_steps=20", "--evaluate_every=20"),
)
APPROACHES = {
    "weights, straight-through, 0.01 steps": ("--learning_rate=0.01",),
    "the same, dampened": ("--learning_rate=0.01", "--dampening=10"),
    "weights and steps, LSQ, 0.003 steps": ("--quantizer=lsq", "--learning_rate=0.003"),
    "gains and biases, 0.001": ("--quantizer=gains", "--learning_rate=0.001"),
}


def main():
    """Measures the curves that are missing and draws them."""
    root = os.environ["LOWBIT_DATA"]
    work = pathlib.Path("runs/four_bits")
    work.mkdir(parents=True, exist_ok=True)
    split(pathlib.Path(root, CALIBRATION), work / "seen.zip", work / "left_out.zip")
    network = ["--model=$ROOT/models/mobilenet_v1_0.25_224.keras", "--preprocess=tf"]
    log = str(work / "log.txt")
    if not (work / "ptq.keras").exists():
        corrections = "--corrections=clipping,regression,adaround,bias_empirical"
        options = ["--scheme=w4a8", corrections, "--calibrator=auto", "--calibration_images=500"]
        command = ["ptq.quantize", *network, f"--dataset={work}/seen.zip", *options]
        processes.run([*command, f"--output={work}/ptq.keras"], root, log)
    pictures = f"{work}/seen.zip,{work}/seen.zip,$ROOT/images/imagenette_train_5000.zip"
    rows = []
    for label, flags in APPROACHES.items():
        command = ["qat.train", *network, f"--start={work}/ptq.keras", f"--dataset={pictures}"]
        command += [f"--val_dataset={work}/left_out.zip", *COMMON, *flags]
        folder = processes.folder(str(work), "run", command)
        if not os.path.exists(f"{folder}/results.csv"):
            processes.run([*command, f"--output_dir={folder}"], root, log)
        (end,) = results.read_rows(f"{folder}/results.csv")
        shared = {"approach": label, "images": end["images"], "command": processes.shown(command)}
        rows.append(shared | {"step": 0, "kl": end["kl_ptq"], "agreement": end["agreement_ptq"]})
        for row in results.read_rows(f"{folder}/validation.csv"):
            rows.append(shared | {name: row[name] for name in ("step", "kl", "agreement")})
        print(f"{label}: {float(end['kl_ptq']):.4f} to {float(end['kl_qat']):.4f}")
        results.write_rows("results/four_bits.csv", rows)
    curves = {
        label: [(int(row["step"]), float(row["kl"])) for row in rows if row["approach"] == label]
        for label in APPROACHES
    }
    title = "MobileNet-v1 0.25, w4a8, 400 pictures left out"
    plots.learning_curves({title: curves}, "docs/four_bits.png", measure="mean KL to float, nats")


def split(source, seen, left_out):
    """Writes 600 of a .zip's pictures to one .zip and the others to another, without labels."""
    if seen.exists() and left_out.exists():
        return
    with zipfile.ZipFile(source) as archive:
        table = csv.DictReader(io.StringIO(archive.read("labels.csv").decode()))
        names = [row["file"] for row in table]
        order = np.random.default_rng(0).permutation(len(names))
        for path, chosen in ((seen, order[:600]), (left_out, order[600:])):
            content = io.BytesIO()
            with zipfile.ZipFile(content, "w") as made:
                for index in sorted(chosen):
                    made.writestr(names[index], archive.read(names[index]))
            files.save_bytes(content.getvalue(), path)


if __name__ == "__main__":
    main()
