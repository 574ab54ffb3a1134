"""Latency of a `.tflite` file: on this machine, on a phone, and what emulators and compilers say.

    python -m eval.latency --model=model.tflite --threads=1
    python -m eval.latency --model=int8.tflite --beside=float.tflite,other.tflite --threads=1,2
    python -m eval.latency --device=adb --model=int8.tflite --beside=float.tflite --threads=1,4
    python -m eval.latency --device=adb --model=int8.tflite --delegate=hexagon \\
        --delegate_libraries=libhexagon_interface.so,libhexagon_nn_skel_v66.so
    python -m eval.latency --device=arm-emulator --cpu=cortex-a76 --model=int8.tflite \\
        --float_model=float.tflite --dataset=images.zip
    python -m eval.latency --device=hexagon-emulator --model=int8.tflite --dataset=images.zip
    python -m eval.latency --device=tflite-micro --model=int8.tflite
    python -m eval.latency --device=ethos-u --model=int8.tflite

With --beside the files, all of the same network, have their turns in every round of one run, so that
other work on the machine falls on all of them; the ratios are medians over the rounds.  Only the
devices host and adb have a latency: the others are emulated or estimated, and say so.
"""

import dataclasses

from eval import on_arm_emulator, on_hexagon_emulator, on_host, on_microcontroller, on_phone
from lowbit import cli, results, runtimes
from lowbit.devices import arm_root, ethos_u

DEVICES = ("host", "adb", "arm-emulator", "hexagon-emulator", *on_microcontroller.DEVICES)
# Images to compare codes on: each takes 20 ms to 3 s.
LIMITS = {"arm-emulator": 20, "hexagon-emulator": 100, "tflite-micro": 10}


@dataclasses.dataclass(frozen=True)
class Config:
    """The command's flags."""

    model: str = cli.field(cli.REQUIRED, "A .tflite file.")
    device: str = cli.field("host", "Where it runs.", choices=DEVICES)
    threads: str | None = cli.field(
        None,
        "host, adb: of the interpreter; several with commas are measured in turn. "
        "Default: 1 on the host, 1,4 through adb.",
    )
    beside: str | None = cli.field(
        None, "host, adb: other files of the same network, with commas, in turn with --model."
    )
    warmup_runs: int = cli.field(10, "host, adb: not counted: caches and packed weights settle.")
    runs: int = cli.field(50, "host, adb: counted; through adb in each round.")
    kernels: str = cli.field(
        "xnnpack", "host: reference: the slow portable kernels.", choices=runtimes.KERNELS
    )
    serial: str | None = cli.field(None, "adb: of the device; default: the only one.")
    adb: str = cli.field("adb", "adb: the client, a name on PATH or a path.")
    benchmark_binary: str | None = cli.field(
        None,
        "adb: Google's benchmark_model for the device, pushed for the run; default: "
        "/data/local/tmp/benchmark_model, or LiteRT's benchmark where the device has Python.",
    )
    delegate: str = cli.field("cpu", "adb: what computes.", choices=on_phone.DELEGATES)
    delegate_libraries: str | None = cli.field(
        None, "adb: files that the delegate needs, with commas; pushed beside the model."
    )
    cores: str = cli.field(
        "big,little", "adb: clusters, with commas: big, mid, little; any: the system chooses."
    )
    xnnpack: str | None = cli.field(
        None,
        "adb: on, off, or on,off: with XNNPACK and without; default: both, where the device's tool can "
        "switch it off.",
    )
    rounds: int = cli.field(
        10, "adb: at most; from 3 on they end when each configuration's last 3 agree within 5 %."
    )
    cool_down_s: float = cli.field(
        60.0, "adb: at most so long until a run begins; it waits for the temperature of the start."
    )
    op_profile: bool = cli.field(
        False,
        "adb: the operators' times too, in phone_operators.csv; needs benchmark_model.  arm-emulator: "
        "their instructions, in arm_emulator_operators.csv.",
    )
    accelerator: str = cli.field(
        "ethos-u55-128", f"ethos-u: with commas: {', '.join(ethos_u.ACCELERATORS)}."
    )
    cpu: str = cli.field(
        "cortex-a76", "arm-emulator: whose instructions it has.", choices=arm_root.CPUS
    )
    float_model: str | None = cli.field(
        None, "arm-emulator: the same network in float, for the ratio of instructions."
    )
    repeats: int = cli.field(3, "arm-emulator: how often instructions are counted.")
    dataset: str | None = cli.field(
        None,
        "Emulators, tflite-micro: images to compare codes on, a name or a path; tflite-micro's "
        "default: random codes.",
    )
    split: str | None = cli.field(
        None,
        "arm-emulator: which of them; default as in eval.accuracy.",
        choices=("train", "validation", "all"),
    )
    limit: int | None = cli.field(
        None,
        "How many of them; default: " + ", ".join(f"{name} {n}" for name, n in LIMITS.items()),
    )
    preprocess: str | None = cli.field(None, "Of the images; default: as saved with the file.")
    output_dir: str = cli.field(
        "results", "Where latency.csv, phone.csv or the device's own CSV gets its rows."
    )


# Whose a flag is; the others are of every device.
_IMAGES = ("arm-emulator", "hexagon-emulator", "tflite-micro")
_DEVICES_OF = {
    **dict.fromkeys(("threads", "beside", "warmup_runs", "runs"), ("host", "adb")),
    "kernels": ("host",),
    **dict.fromkeys(("serial", "adb", "benchmark_binary", "delegate"), ("adb",)),
    **dict.fromkeys(("delegate_libraries", "cores", "xnnpack", "rounds", "cool_down_s"), ("adb",)),
    "op_profile": ("adb", "arm-emulator"),
    **dict.fromkeys(("cpu", "float_model", "repeats", "split"), ("arm-emulator",)),
    **dict.fromkeys(("dataset", "limit", "preprocess"), _IMAGES),
    "accelerator": ("ethos-u",),
}


def measure(config: Config) -> dict:
    """Runs the command; returns its result row.

    Raises:
      ValueError: for a flag of another device, and as the device's own `measure`.
    """
    for item in dataclasses.fields(config):
        devices = _DEVICES_OF.get(item.name, DEVICES)
        if config.device not in devices and getattr(config, item.name) != item.default:
            raise ValueError(
                f"--{item.name} is of --device={', '.join(devices)}, not of {config.device}"
            )
    results.check_folder(config.output_dir)
    if config.device == "host":
        return on_host.measure(
            config.model,
            threads=config.threads or "1",
            beside=config.beside,
            warmup_runs=config.warmup_runs,
            runs=config.runs,
            kernels=config.kernels,
            output_dir=config.output_dir,
        )
    if config.device == "adb":
        return on_phone.measure(
            models=[config.model, *cli.words(config.beside)],
            serial=config.serial,
            client=config.adb,
            benchmark_binary=config.benchmark_binary,
            delegate=config.delegate,
            delegate_libraries=cli.words(config.delegate_libraries),
            cores=cli.words(config.cores),
            threads=on_host.thread_counts(config.threads or "1,4"),
            xnnpack=None if config.xnnpack is None else _switches(config.xnnpack),
            runs=config.runs,
            warmup_runs=config.warmup_runs,
            rounds=config.rounds,
            cool_down_s=config.cool_down_s,
            op_profile=config.op_profile,
            output_dir=config.output_dir,
        )
    if config.dataset is None and config.device.endswith("emulator"):
        raise ValueError(f"--device={config.device} compares codes: --dataset names the images")
    limit = config.limit if config.limit is not None else LIMITS.get(config.device, 1)
    if config.device == "arm-emulator":
        return on_arm_emulator.measure(
            model=config.model,
            dataset=config.dataset,
            cpu=config.cpu,
            split=config.split,
            limit=limit,
            preprocess=config.preprocess,
            float_model=config.float_model,
            repeats=config.repeats,
            operators=config.op_profile,
            output_dir=config.output_dir,
        )
    if config.device == "hexagon-emulator":
        return on_hexagon_emulator.measure(
            config.model,
            config.dataset,
            images=limit,
            preprocess=config.preprocess,
            output_dir=config.output_dir,
        )
    return on_microcontroller.measure(
        config.model,
        config.device,
        accelerator=config.accelerator,
        dataset=config.dataset,
        images=limit,
        preprocess=config.preprocess,
        output_dir=config.output_dir,
    )


def _switches(text: str) -> list[bool]:
    words = cli.words(text)
    if not words or not set(words) <= {"on", "off"} or len(set(words)) < len(words):
        raise ValueError(f"--xnnpack={text} is not on, off, or on,off")
    return [word == "on" for word in words]


def main() -> None:
    """Runs the command line."""
    cli.run(measure, Config)


if __name__ == "__main__":
    main()
