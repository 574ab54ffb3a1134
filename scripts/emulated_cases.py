"""Every case of eval.conformance on emulated arm64 cores: output codes that differ from this host's.

    python scripts/emulated_cases.py

One small int8 network a case, 8 images; rows go to results/emulated_cases.csv.  Nothing here is time.
"""

import argparse
import sys

import numpy as np

from eval import conformance
from lowbit import (
    calibration,
    lowering,
    placement,
    progress,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.devices import arm_emulator, arm_root
from lowbit.kernels import delegate

SIZE = (9, 8)


def main():
    """Measures every case and prints those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpus", default="cortex-a53,cortex-a76")
    parser.add_argument("--output", default="results/emulated_cases.csv")
    arguments = parser.parse_args()
    root = arm_root.set_up()
    names = list(conformance.known_cases())
    made = []
    with progress.bar("networks", len(names)) as update:
        for number, name in enumerate(names):
            made.append(network(name, number))
            update(number + 1)
    rows = []
    for cpu in arguments.cpus.split(","):
        contents, inputs = [each[1] for each in made], [[each[2]] for each in made]
        runs = arm_emulator.run_all(contents, inputs, cpu, "cases", 2, root)
        for name, (graph, _, _, host), run in zip(names, made, runs, strict=True):
            difference = np.abs(run.outputs[0].astype(np.int64) - host)
            placed = {node.op: delegate.placement_of(graph, node)[0] for node in graph.nodes}
            rows.append(
                {
                    "case": name,
                    "emulated_cpu": cpu,
                    "outside_xnnpack": " ".join(
                        op for op, kernel in placed.items() if kernel != "xnnpack"
                    ),
                    "codes": difference.size,
                    "distinct": len(np.unique(host)),
                    "differing_from_host": int((difference > 0).sum()),
                    "worst_difference": int(difference.max()),
                    "emulated_instructions": run.counts[0]["all"],
                    "emulated_counts_differ": run.counts[0] != run.counts[1],
                    "ai_edge_litert": root.versions["ai-edge-litert"],
                    "qemu": root.versions["qemu"],
                }
            )
    results.write_rows(arguments.output, rows)
    shown = ["case", "emulated_cpu", "outside_xnnpack", "codes", "differing_from_host"]
    differing = [row for row in rows if row["differing_from_host"]]
    print(f"{len(rows)} runs, {sum(row['codes'] for row in rows)} codes", file=sys.stderr)
    print(results.table(differing, shown))


def network(case, seed):
    """Returns one small network's graph, its file, input codes, and the host's output codes."""
    model, _ = conformance.build(conformance.Plan((case,), SIZE, 4, seed))
    images = conformance.smooth_images(np.random.default_rng(seed), conformance.IMAGES, *SIZE)
    placed = placement.place(model, spec.scheme("w8a8"))
    calibration.calibrate(placed, [images])
    graph = lowering.lower(placed)
    content = tflite_file.write(graph)
    codes = runtimes.graph_codes(graph, images)
    runner = runtimes.interpreter(content)
    host = runtimes.invoke_each(runner, codes)
    return graph, content, codes, host


if __name__ == "__main__":
    main()
