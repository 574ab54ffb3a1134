"""The emulated phone: its codes are this host's, its counts are exact and repeat, its refusals."""

import concurrent.futures
import json
import os
import pathlib
import platform
import shutil
import subprocess

import numpy as np
import pytest

from eval import conformance, on_arm_emulator
from lowbit import (
    calibration,
    files,
    integer_graph,
    lowering,
    placement,
    results,
    runtimes,
    spec,
    tflite_file,
)
from lowbit.devices import arm_emulator, arm_root, cache, debian


@pytest.fixture(scope="module")
def root():
    """The emulated phone; skips, by name, where it cannot be set up, which in CI is a failure."""
    try:
        return arm_root.set_up()
    except (arm_root.ArmRootError, debian.DebianError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"NO EMULATED PHONE ON THIS HOST: {error}")


def lowered(case, seed=0, size=(9, 8)):
    """Returns the integer graph of a small network of one of conformance's cases, and its inputs."""
    model, _ = conformance.build(conformance.Plan((case,), size, 4, seed))
    images = conformance.smooth_images(np.random.default_rng(seed), 8, *size)
    placed = placement.place(model, spec.scheme("w8a8"))
    calibration.calibrate(placed, [images])
    graph = lowering.lower(placed)
    return graph, runtimes.graph_codes(graph, images)


def on_host(content, codes):
    runner = runtimes.interpreter(content)
    return np.concatenate([runtimes.invoke(runner, image[None]) for image in codes])


def relu(shape=(1, 8, 8, 3)):
    quantization = integer_graph.Quantization(np.full(1, 0.1, np.float32), np.zeros(1, np.int64))
    tensors = {name: integer_graph.Tensor(name, shape, "int8", quantization) for name in ("x", "y")}
    node = integer_graph.Node("RELU", "relu", ("x",), ("y",))
    return tflite_file.write(integer_graph.IntegerGraph(tensors, (node,), ("x",), ("y",)))


# --- codes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def networks():
    """Returns (case, file, its inputs, the host's outputs) of every sixth case.

    Of all 109 SOFTMAX alone differs (below).
    """
    made = []
    cases = [case for case in list(conformance.known_cases())[::6] if "softmax" not in case]
    for seed, case in enumerate(cases):
        graph, codes = lowered(case, seed)
        content = tflite_file.write(graph)
        made.append((case, content, codes, on_host(content, codes)))
    return made


@pytest.mark.slow  # 20 s, and once the set-up
@pytest.mark.parametrize("cpu", arm_root.CPUS)
def test_codes_are_the_hosts_whatever_the_kernels(root, networks, cpu):
    contents, inputs = [each[1] for each in networks], [[each[2]] for each in networks]
    runs = arm_emulator.run_all(contents, inputs, cpu, "m", 2, root)
    for (case, _, _, host), run in zip(networks, runs, strict=True):
        assert np.unique(host).size > 4, case
        np.testing.assert_array_equal(run.outputs[0], host, err_msg=case)
        assert run.counts[0] == run.counts[1] and len(run.counts) == 2
        count = run.counts[0]
        assert count["simd_fp"] + count["memory"] + count["branch"] < count["all"]
    total = {name: sum(run.counts[0][name] for run in runs) for name in arm_emulator.CLASSES}
    # The A53 is older than dot products of int8: its kernels multiply and add.
    assert (total["int8_dot"] == 0) == (cpu == "cortex-a53")
    assert total["int_multiply_add"] > 0


@pytest.mark.slow
def test_two_cpus_at_once_do_not_disturb_each_other(root):
    graph, codes = lowered(next(iter(conformance.known_cases())))
    content = tflite_file.write(graph)

    def run(cpu):
        return arm_emulator.run(content, [codes], cpu, "m", 2, root)

    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        pairs = [list(executor.map(run, ("cortex-a53", "cortex-a76"))) for _ in range(2)]
    for old, new in pairs:
        np.testing.assert_array_equal(old.outputs[0], new.outputs[0])
        assert old.counts[0]["int8_dot"] == 0 < new.counts[0]["int8_dot"]
    assert [run.counts for run in pairs[0]] == [run.counts for run in pairs[1]]


@pytest.mark.slow
def test_the_op_that_differs_is_named(root):
    """SOFTMAX is none of XNNPACK's, and LiteRT's own on arm64 is not that of x86-64."""
    case = "softmax over channels"
    graph, codes = lowered(case, list(conformance.known_cases()).index(case))
    content = tflite_file.write(graph)
    run = arm_emulator.run(content, [codes], "cortex-a76", "m", 0, root)
    differing = run.outputs[0] != on_host(content, codes)
    assert 0 < differing.sum() < 0.1 * differing.size and run.counts == ()
    image = int(differing.any(axis=1).argmax())
    rows = on_arm_emulator.node_rows("m", content, codes[image : image + 1], "cortex-a76", root)
    assert [row["op"] for row in rows] == [node.op for node in graph.nodes] and len(rows) > 1
    assert [row["op"] for row in rows if row["differing"]] == ["SOFTMAX"]
    assert any("SOFTMAX" in text for text in on_arm_emulator.outside_xnnpack(graph))


@pytest.mark.slow
def test_a_row_of_a_file(root, tmp_path):
    graph, _ = lowered("softmax over channels", 4)
    path, in_float = str(tmp_path / "m.tflite"), str(tmp_path / "float.tflite")
    files.save_bytes(tflite_file.write(graph, {"preprocess": "tf"}), path)
    model, _ = conformance.build(conformance.Plan(("softmax over channels",), (9, 8), 4, 4))
    content = tflite_file.write(
        lowering.lower(placement.place(model, spec.scheme("float32"))), {"preprocess": "tf"}
    )
    files.save_bytes(content, in_float)
    row = on_arm_emulator.measure(
        model=path,
        float_model=in_float,
        dataset="digits",
        limit=12,
        cpu="cortex-a53",
        operators=True,
        output_dir=str(tmp_path),
    )
    json.dumps(row)
    assert (row["tool"], row["device"], row["emulated_cpu"]) == (
        "eval.latency",
        "arm-emulator",
        "cortex-a53",
    )
    assert row["images"] == 12 and row["output_codes"] % 12 == 0
    assert "SOFTMAX" in row["outside_xnnpack"]
    assert row["emulated_counts_differ_by"] == row["float_emulated_counts_differ_by"] == 0
    assert row["emulated_instruction_ratio"] == pytest.approx(
        row["float_emulated_instructions_all"] / row["emulated_instructions_all"], abs=1e-4
    )
    (stored,) = results.read_rows(tmp_path / "arm_emulator.csv")
    assert stored["emulated_instructions_all"] == str(row["emulated_instructions_all"])
    nodes = results.read_rows(tmp_path / "arm_emulator_operators.csv")
    assert [node["op"] for node in nodes] == [node.op for node in graph.nodes]
    assert {node["op"] for node in nodes if node["differing"] != "0"} <= {"SOFTMAX"}
    # A node alone takes its invocation's instructions more than within the network.
    alone = sum(int(node["emulated_instructions_all"]) for node in nodes)
    whole = row["emulated_instructions_all"]
    assert 0 < alone - whole < 12_000 * len(nodes)


# --- counts -------------------------------------------------------------------------------------

# Class of icount.c: instructions that it holds, as GNU's assembler writes them.
INSTRUCTIONS = {
    "int8_dot": """
        sdot v0.4s, v1.16b, v2.16b
        udot v0.2s, v1.8b, v2.8b
        sdot v0.4s, v1.16b, v2.4b[3]
        udot v0.4s, v1.16b, v18.4b[1]
    """,
    "int_multiply_add": """
        smlal v0.8h, v1.8b, v2.8b
        umlal2 v0.4s, v1.8h, v2.8h
        smlal v0.4s, v1.4h, v2.h[7]
        smlal2 v0.4s, v1.8h, v12.h[0]
        smull v0.8h, v1.8b, v2.8b
        umull2 v0.4s, v1.8h, v2.h[3]
        mla v0.8h, v1.8h, v2.8h
        mla v0.4s, v1.4s, v2.s[1]
        mul v0.4s, v1.4s, v2.4s
        mul v0.8h, v1.8h, v2.h[5]
    """,
    "fp_fma": """
        fmla v0.4s, v1.4s, v2.4s
        fmls v0.2d, v1.2d, v2.2d
        fmla v0.4s, v1.4s, v2.s[3]
        fmls v0.2s, v1.2s, v31.s[0]
        fmla v0.8h, v1.8h, v2.8h
        fmla v0.8h, v1.8h, v2.h[1]
        fmadd s0, s1, s2, s3
        fnmsub d0, d1, d2, d3
    """,
    "simd_fp": """
        fadd v0.4s, v1.4s, v2.4s
        fmul v0.4s, v1.4s, v2.s[1]
        sqrdmulh v0.4s, v1.4s, v2.4s
        sqdmulh v0.4s, v1.4s, v2.s[1]
        sadalp v0.4s, v1.8h
        saddl v0.8h, v1.8b, v2.8b
        smax v0.16b, v1.16b, v2.16b
        sqxtn v0.8b, v1.8h
        dup v0.4s, w1
        movi v0.4s, 1
        fcvtns w0, s1
        scvtf s0, w1
    """,
    "memory": """
        ldr x0, [sp]
        str w0, [sp]
        ldp q0, q1, [sp]
        ld1 {v0.16b, v1.16b}, [x9]
        st1 {v0.s}[1], [x9]
        ld1r {v0.4s}, [x9]
        ldrsb w0, [sp, 1]
        prfm pldl1keep, [sp]
    """,
    "branch": """
        b 1f
    1:  cbz xzr, 1f
    1:  tbnz xzr, 3, 1f
    1:  bl 1f
    1:  nop
        mrs x0, fpcr
    """,
    "none": """
        add x0, x0, 1
        madd x0, x1, x2, x3
        smull x0, w1, w2
        mov x1, sp
        csel x0, x1, x2, eq
        ubfx x0, x1, 3, 4
    """,
}
_MARK = "mov x0, -4242\nmov x8, 57\nsvc 0\n"


@pytest.mark.slow  # fetches a package of Debian, once
def test_every_class_counts_its_instructions_and_no_other(root, tmp_path):
    """A program of GNU's assembler, of so many instructions of each class between marks."""
    tools = cache.cache_folder() / "binutils"
    debian.unpack(["binutils-aarch64-linux-gnu"], tools)
    loader = [tools / "lib64/ld-linux-x86-64.so.2", "--library-path"]
    loader.append(tools / "usr/lib/x86_64-linux-gnu")
    blocks = "".join(f"{block}\n{_MARK}" for block in INSTRUCTIONS.values())
    source = tmp_path / "program.s"
    source.write_text(
        f".globl _start\n_start: sub sp, sp, 64\nmov x9, sp\n{_MARK}{blocks}"
        "mov x0, 0\nmov x8, 93\nsvc 0\n"
    )
    names = [tools / "usr/bin/aarch64-linux-gnu-as", tools / "usr/bin/aarch64-linux-gnu-ld"]
    assemble = [*loader, names[0], "-march=armv8.4-a+fp16", "-o", tmp_path / "o", source]
    subprocess.run(assemble, check=True)
    subprocess.run([*loader, names[1], "-o", tmp_path / "program", tmp_path / "o"], check=True)
    told = tmp_path / "counts"
    subprocess.run([*root.qemu("cortex-a76", told), tmp_path / "program"], env={}, check=True)
    lines = [line for line in told.read_text().splitlines() if line.startswith("mark")][1:]
    assert len(lines) == len(INSTRUCTIONS)
    for (kind, block), line in zip(INSTRUCTIONS.items(), lines, strict=True):
        counts = {name: int(n) for name, n in (word.split("=") for word in line.split()[1:])}
        size = len(block.strip().splitlines())
        expected = dict.fromkeys(arm_emulator.CLASSES, 0) | {"all": size + 3, "branch": 1}
        if kind != "none":
            expected[kind] += size
        if kind in ("int8_dot", "int_multiply_add", "fp_fma"):
            expected["simd_fp"] = size
        assert counts == expected, kind


@pytest.mark.slow
def test_the_plugin_says_what_it_needs(root, tmp_path):
    command = root.qemu("cortex-a76", tmp_path / "none/counts")
    done = subprocess.run(
        [*command, root.prefix("cortex-a76") / "usr/bin/true"], capture_output=True
    )
    assert done.returncode and b"none/counts: No such file" in done.stderr


def test_the_page_says_what_the_rows_say():
    folder = pathlib.Path(__file__).parents[1]
    page = (folder / "docs/emulated_arm.md").read_text()
    rows = results.read_rows(folder / "results/arm_emulator.csv")
    assert len(rows) >= 9
    for row in rows:
        assert row["emulated_counts_differ_by"] == row["float_emulated_counts_differ_by"] == "0"
        millions = (int(row[f"{kind}emulated_instructions_all"]) / 1e6 for kind in ("", "float_"))
        cells = [row["model"].partition(".")[0], row["emulated_cpu"], row["differing_from_host"]]
        cells += [f"{count:.2f}" for count in millions]
        cells.append(f"{float(row['emulated_instruction_ratio']):.2f}")
        assert f"| {' | '.join(cells)} | 3, equal |" in page


# --- files of anyone, and hosts of anyone -------------------------------------------------------


@pytest.mark.slow
def test_what_the_emulated_interpreter_refuses_is_told(root):
    with pytest.raises(runtimes.RefusedError, match="m: LiteRT on an emulated cortex-a53 refuses"):
        arm_emulator.run(relu(), [np.zeros((1, 4, 4, 3), np.int8)], "cortex-a53", "m", 0, root)
    with pytest.raises(runtimes.RefusedError, match="m: LiteRT on an emulated .*does not end"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runtimes, "TRIAL_SECONDS", 0.01)
            patch.setattr(arm_emulator, "_SECONDS_AN_IMAGE", 0)
            arm_emulator.run(relu(), [np.zeros((1, 8, 8, 3), np.int8)], "cortex-a53", "m", 0, root)


def test_arguments_and_damaged_files_are_refused_before_anything_is_set_up(monkeypatch, tmp_path):
    monkeypatch.setattr(arm_root, "set_up", None)
    image = [np.zeros((1, 8, 8, 3), np.int8)]
    with pytest.raises(
        ValueError, match="CPU 'max' is not one of cortex-a53, cortex-a55, cortex-a"
    ):
        arm_emulator.run(relu(), image, "max")
    with pytest.raises(tflite_file.TFLiteFileError, match="m.tflite"):
        arm_emulator.run(relu()[:200], image, "cortex-a76", "m.tflite")
    with pytest.raises(ValueError, match="m.tflite: an input without images"):
        arm_emulator.run(relu(), [image[0][:0]], "cortex-a76", "m.tflite")
    with pytest.raises(ValueError, match="-1 repeats"):
        arm_emulator.run(relu(), image, "cortex-a76", repeats=-1)
    path = str(tmp_path / "m.tflite")
    files.save_bytes(relu(), path)
    measure = {"model": path, "dataset": "digits", "output_dir": str(tmp_path)}
    for wrong, message in (
        ({"cpu": "pixel"}, "CPU 'pixel' is not one of"),
        ({"limit": 0}, "--limit=0"),
        ({"repeats": 0}, "--repeats=0"),
        ({"model": "m.keras"}, "m.keras: the emulated phone runs .tflite files"),
        ({}, "does not say how its images are normalized"),
    ):
        with pytest.raises(ValueError, match=message):
            on_arm_emulator.measure(**(measure | wrong))
    flat = str(tmp_path / "flat.tflite")
    files.save_bytes(relu((1, 8)), flat)
    with pytest.raises(ValueError, match=r"flat.tflite takes input of shape \(1, 8\)"):
        on_arm_emulator.measure(**(measure | {"model": flat}))
    with pytest.raises(ValueError, match="not the same network"):
        small = str(tmp_path / "small.tflite")
        files.save_bytes(relu((1, 4, 4, 3)), small)
        on_arm_emulator.measure(**measure, float_model=small)
    with pytest.raises(ValueError, match="computes in integers; the ratio is of float to integers"):
        on_arm_emulator.measure(**measure, float_model=measure["model"])


@pytest.mark.parametrize("system, machine", [("Darwin", "x86_64"), ("Linux", "aarch64")])
def test_other_hosts_are_refused(monkeypatch, tmp_path, system, machine):
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    with pytest.raises(arm_root.ArmRootError, match=f"needs Linux on x86_64; this is {system} on"):
        arm_root.set_up(tmp_path / "arm")
    assert not (tmp_path / "arm").exists()


def test_without_a_compiler_or_with_a_damaged_source_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(arm_root.ArmRootError, match="a C compiler is missing .* install gcc"):
        arm_root._plugin(tmp_path)
    monkeypatch.undo()
    source = tmp_path / "icount.c"
    source.write_text("int wrong(")
    monkeypatch.setattr(arm_root, "_ICOUNT", source)
    if shutil.which("gcc"):
        with pytest.raises(arm_root.ArmRootError, match="icount.c: gcc fails"):
            arm_root._plugin(tmp_path)


def test_each_cpu_has_its_own_description(tmp_path):
    arm_root._cpus(tmp_path)
    texts = {name: (tmp_path / name / "proc/cpuinfo").read_text() for name in arm_root.CPUS}
    assert "CPU part\t: 0xd03\n" in texts["cortex-a53"]
    assert "CPU variant\t: 0x4\n" in texts["cortex-a76"] and "asimddp" in texts["cortex-a76"]
    assert "asimddp" not in texts["cortex-a53"]
    assert os.readlink(tmp_path / "cortex-a53/usr") == "../../system/usr"
    assert (tmp_path / "cortex-a53/sys/devices/system/cpu/present").read_text() == "0\n"


def test_a_folder_is_built_once_and_whole(tmp_path):
    folder = tmp_path / "built"
    calls = []

    def make(temporary: pathlib.Path):
        calls.append(temporary)
        (temporary / "part").write_text("1")
        if len(calls) == 1:
            raise OSError("cut off")
        return {"n": len(calls)}

    with pytest.raises(OSError, match="cut off"):
        cache.build_once(folder, {"a": 1}, make)
    assert not folder.exists()
    assert cache.build_once(folder, {"a": 1}, make) == {"n": 2}
    assert cache.build_once(folder, {"a": 1}, make) == {"n": 2} and len(calls) == 2
    assert cache.build_once(folder, {"a": 2}, make) == {"n": 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == [".built.lock", "built"]
    (folder / cache.STAMP).write_text("{")  # damaged: whose it is is not known
    with pytest.raises(ValueError, match="not ours to replace"):
        cache.build_once(folder, {"a": 2}, make)
