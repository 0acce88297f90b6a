"""The bounds: counted right, in the right order, and as the page says."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.kernels.bounds.bound import NOTHING, _makespan, flat, slower
from benchmarks.kernels.bounds.compiled import SERVED, VERSIONS, compiled
from benchmarks.kernels.bounds.layer import chunks_of
from benchmarks.kernels.bounds.tables import CHUNKS, LENGTHS, REQUEST_LENGTHS, tables
from benchmarks.kernels.bounds.targets import REQUEST_TARGETS, targets
from benchmarks.kernels.generated import fill, part
from benchmarks.kernels.prediction import (
    DEVICES,
    MODES,
    PAGE,
    WAYS,
    device_for,
    main,
    predict_estimate,
    predict_layer,
    predict_request,
    predict_selection,
    predict_sparse,
)
from vllm_trimix.patterns.triangle import Triangle

HOPPER = ("H100", "H200")
LONG = 131072


def ways(device: str) -> list[str]:
    """Those that a device has."""
    return [way for way in WAYS if device in HOPPER or "flash" not in way]


LAYERS = [(device, way) for device in DEVICES for way in ways(device)]


def test_the_page_holds_the_tables() -> None:
    page = PAGE.read_text()
    assert fill(page, tables()) == page, "run python -m benchmarks.kernels.prediction --write"


def test_the_command_prints_every_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prediction"])
    main()
    out = capsys.readouterr().out
    for name, text in tables().items():
        assert f"## {name}\n\n{text}\n" in out


class TestGeneratedParts:
    def test_only_their_own_place_changes(self) -> None:
        page = f"before\n\n{part('a', 'old')}\n\nbetween\n\n{part('b', 'old')}\n\nafter\n"
        filled = fill(page, {"a": "new a", "b": r"new \1"})
        assert (
            filled
            == f"before\n\n{part('a', 'new a')}\n\nbetween\n\n{part('b', chr(92).join(['new ', '1']))}\n\nafter\n"
        )
        assert fill(filled, {"a": "new a", "b": r"new \1"}) == filled

    @pytest.mark.parametrize("parts", [{}, {"a": "", "b": ""}, {"b": ""}])
    def test_a_page_of_other_parts_is_refused(self, parts: dict[str, str]) -> None:
        with pytest.raises(ValueError, match="the page has the parts"):
            fill(part("a", "text"), parts)


class TestDevices:
    @pytest.mark.parametrize(
        ("torch_name", "key"),
        [
            ("NVIDIA H200", "H200"),
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA B200", "B200"),
            ("NVIDIA H100 PCIe", None),
            ("NVIDIA H100 NVL", None),
            ("NVIDIA H200 NVL", None),
            ("NVIDIA H200 MIG 1g.18gb", None),
            ("NVIDIA GH200 480GB", None),
            ("NVIDIA A100-SXM4-80GB", None),
            ("", None),
        ],
    )
    def test_are_found_by_their_name(self, torch_name: str, key: str | None) -> None:
        found = device_for(torch_name)
        assert (found.name if found else None) == key

    def test_run_no_faster_than_their_data_sheets(self) -> None:
        for device, peak, memory in (("H100", 989e12, 3.35e12), ("H200", 989e12, 4.8e12), ("B200", 2250e12, 8e12)):
            assert 0.7 * peak < DEVICES[device].matmul_flop_s < peak
            assert DEVICES[device].dense_flop_s < DEVICES[device].matmul_flop_s
            assert 0.8 * memory < DEVICES[device].hbm_bytes_s < memory


class TestOneLayer:
    def test_products_are_those_of_the_tiles(self) -> None:
        """Counted again, tile by tile: 32 tokens with four heads, steps of 64 keys, 16 for the sinks."""
        cycles = 0.0
        for first in range(0, 8192 - 128, 32):
            begin = max(first - 511, min(8, first + 32))
            steps = -(-(first + 32 - begin // 64 * 64) // 64) + 16 / 64
            cycles += 8 * steps * 4 * 128 * 64 * 128 / 4096
        # Four tiles of last rows, their keys in parts that start at multiples of 128.
        for first in range(8192 - 128, 8192, 32):
            cycles += 8 * -(-(first + 32) // 64) * 4 * 128 * 64 * 128 / 4096
        device = DEVICES["H200"]
        expected = cycles / 132 / device.clock
        assert predict_layer("H200", 8192, None).alone["tensor cores"] == pytest.approx(expected, rel=1e-9)

    def test_instructions_are_the_compilers(self) -> None:
        alone = predict_layer("H200", 8192, None).alone
        # Eight warps on four schedulers, against 1024 cycles of products a step.
        expected = alone["tensor cores"] * compiled("prefill", 90).instructions * 8 / 4 / 1024
        assert alone["instructions"] == pytest.approx(expected)

    @pytest.mark.parametrize(("device", "way"), LAYERS)
    @pytest.mark.parametrize("chunk", CHUNKS)
    def test_dense_grows_with_the_square_and_the_triangle_with_the_length(
        self, device: str, way: str, chunk: int | None
    ) -> None:
        half, whole = (predict_layer(device, length, chunk, way).seconds for length in (LONG // 2, LONG))
        # The few programs of the last rows are as long as the latencies allow.
        within = 0.1 if way == "last_rows" else 0.04
        assert whole / half == pytest.approx(4 if way == "dense" else 2, rel=within)

    @pytest.mark.parametrize(("device", "way"), LAYERS)
    def test_no_resource_takes_longer_than_the_whole(self, device: str, way: str) -> None:
        for length, chunk in itertools.product(LENGTHS, CHUNKS):
            bound = predict_layer(device, length, chunk, way)
            assert max(bound.alone.values()) <= bound.seconds * (1 + 1e-9)
            assert sum(bound.deciding.values()) == bound.seconds
            assert bound.deciding[bound.resource] == max(bound.deciding.values())

    @pytest.mark.parametrize("way", WAYS)
    def test_more_memory_bandwidth_never_slows(self, way: str) -> None:
        for length in LENGTHS:
            h100, h200 = (predict_layer(device, length, 8192, way) for device in HOPPER)
            assert h200.seconds <= h100.seconds
            assert h200.alone["HBM"] < h100.alone["HBM"]
        if way == "trimix_flash_merge":
            assert h200.seconds < 0.9 * h100.seconds

    def test_a_short_prompt_is_dense(self) -> None:
        assert predict_layer("H200", 512, None).seconds == predict_layer("H200", 512, None, "dense").seconds > 0

    def test_blackwells_instructions_are_left_out(self) -> None:
        assert "instructions" in predict_layer("H200", 8192, None).alone
        assert "instructions" not in predict_layer("B200", 8192, None).alone

    @pytest.mark.parametrize("version", VERSIONS)
    def test_every_version_has_a_bound(self, version: str) -> None:
        assert predict_layer("H200", 8192, 8192, triton=version).seconds > 0

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("A100", 8192, None), "choose one of H100, H200, B200"),
            (("H200", 8192, None, "flash"), "choose one of dense, trimix_triton"),
            (("B200", 8192, None, "trimix_flash_merge"), "Hopper's FlashAttention 3"),
        ],
    )
    def test_what_it_does_not_know_is_refused(self, arguments: tuple, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            predict_layer(*arguments)

    def test_an_unknown_triton_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"stored are 3\.6\.0"):
            predict_layer("H200", 8192, 8192, triton="3.5.0")


class TestSparse:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("block_size", [64, 128])
    def test_time_goes_with_the_keys_read(self, device: str, block_size: int) -> None:
        tenth, half = (
            predict_sparse(device, LONG - 8192, LONG, density, block_size=block_size).seconds for density in (0.1, 0.5)
        )
        assert half / tenth == pytest.approx(5, rel=0.05)

    @pytest.mark.parametrize("device", DEVICES)
    def test_narrow_blocks_read_twice_as_much(self, device: str) -> None:
        narrow, wide = (predict_sparse(device, LONG - 8192, LONG, 0.1, block_size=size) for size in (64, 128))
        assert narrow.alone["L2"] / wide.alone["L2"] == pytest.approx(2, rel=0.05)
        assert narrow.seconds > wide.seconds

    def test_keys_that_nobody_shares_come_from_memory(self) -> None:
        shared, alone = (predict_sparse("H200", 0, 32768, 0.5, shared=shared) for shared in (True, False))
        assert alone.alone["HBM"] > 10 * shared.alone["HBM"]
        assert alone.seconds == alone.alone["HBM"] > shared.seconds

    @pytest.mark.parametrize("density", [0.0, 1.1])
    def test_density_is_a_share(self, density: float) -> None:
        with pytest.raises(ValueError, match="outside"):
            predict_sparse("H200", 0, 8192, density)

    @pytest.mark.parametrize("device", DEVICES)
    def test_the_estimate_is_linear_in_its_keys_and_rows(self, device: str) -> None:
        one = predict_estimate(device, 65536).seconds
        assert predict_estimate(device, LONG).seconds / one == pytest.approx(2, rel=0.1)
        assert predict_estimate(device, 65536, rows=128).seconds / one == pytest.approx(2, rel=0.1)

    def test_choosing_costs_less_than_attending(self) -> None:
        for chunk in (2048, 8192):
            chosen = predict_selection("H200", chunk, LONG).seconds
            assert 0 < chosen < predict_sparse("H200", LONG - chunk, LONG, 0.1).seconds


class TestRequests:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("length", REQUEST_LENGTHS)
    @pytest.mark.parametrize("chunk", CHUNKS)
    def test_each_mode_is_faster_than_the_one_before(self, device: str, length: int, chunk: int | None) -> None:
        seconds = [predict_request(device, length, chunk, mode).seconds for mode in MODES]
        assert seconds == sorted(seconds, reverse=True)
        assert len(set(seconds)) == len(MODES)

    def test_linear_layers_are_two_flop_for_each_parameter_and_token(self) -> None:
        parameters = 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
        least = 2 * parameters * LONG / 788e12
        assert predict_request("H200", LONG, 8192, "floor").linear == pytest.approx(least, rel=0.01)
        # The last wave of tiles is less full.
        assert 1.01 * least < predict_request("H200", LONG, 512, "floor").linear < 1.2 * least

    def test_a_short_step_waits_for_the_weights(self) -> None:
        weights = 2 * 32 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)
        assert weights / 4.3e12 < predict_request("H200", 128, None, "floor").linear < 2 * weights / 4.3e12

    def test_memory_counts(self) -> None:
        assert (
            predict_request("H200", LONG, 8192, "stock").seconds < predict_request("H100", LONG, 8192, "stock").seconds
        )

    def test_short_prompts_are_stock_but_for_the_plan(self) -> None:
        for length in (512, 2048, 4095):
            stock, ours = (predict_request("H200", length, 8192, mode) for mode in ("stock", "triangle"))
            assert 0 < ours.seconds - stock.seconds <= 0.1e-3
        stock, ours = (predict_request("H200", 4096, 8192, mode) for mode in ("stock", "triangle"))
        assert ours.triangle > 0
        assert ours.seconds < stock.seconds

    def test_early_chunks_stay_dense_where_the_pattern_starts_late(self) -> None:
        early, late, never = (
            predict_request("H200", LONG, 8192, "triangle+pattern", min_seq_len=start) for start in (0, 65536, LONG + 1)
        )
        assert early.seconds < late.seconds < never.seconds
        # The eighth chunk ends at 65536 tokens and is the first that isn't dense.
        dense = 16 * predict_layer("H200", 7 * 8192, 8192, "dense").seconds
        assert late.dense - early.dense == pytest.approx(dense)
        assert never.pattern == 0
        assert never.seconds == pytest.approx(predict_request("H200", LONG, 8192, "triangle").seconds)

    def test_an_unknown_mode_is_refused(self) -> None:
        with pytest.raises(ValueError, match="choose one of stock, triangle"):
            predict_request("H200", LONG, 8192, "dense")

    @pytest.mark.parametrize(("mode", "wanted"), REQUEST_TARGETS)
    def test_room_is_what_reaches_the_target(self, mode: str, wanted: float) -> None:
        name = f"128K, {mode.replace('+', ' + ')}: {wanted:g}x stock"
        (room,) = [float(row[3].split()[0]) for row in targets() if row[0] == name]
        best = predict_request("H200", LONG, 8192, mode)
        slowed = replace(best, triangle=room * best.triangle, pattern=room * best.pattern)
        stock = predict_request("H200", LONG, 8192, "stock")
        assert stock.seconds / slowed.seconds == pytest.approx(wanted, rel=0.02)


class TestBounds:
    def test_programs_start_where_a_slot_is_free(self) -> None:
        assert _makespan(np.array([10.0, 1.0]), 2) == 10 + 2400
        # 5 and 3 together, 4 where 3 ended.
        assert _makespan(np.array([5e3, 3e3, 4e3]), 2) == 3e3 + 4e3 + 2 * 2400

    def test_add_up_and_overlap(self) -> None:
        one, other = flat(2.0, "L2"), flat(3.0, "HBM")
        assert ((one + other).seconds, slower(one, other).seconds) == (5.0, 3.0)
        assert dict((one + one + other).alone) == {"L2": 4.0, "HBM": 3.0}
        assert (one + one + other).resource == "L2"
        assert slower(one, other).resource == "HBM"
        assert (NOTHING + one).seconds == 2.0

    def test_chunks_cover_the_prompt(self) -> None:
        assert list(chunks_of(10, 4)) == [(0, 4), (4, 8), (8, 10)]
        assert list(chunks_of(10, None)) == [(0, 10)]

    def test_a_variant_that_was_not_compiled_is_refused(self) -> None:
        assert compiled("sparse-64", 90).programs == 2
        with pytest.raises(ValueError, match=f"no stored report of prefill, sm_75.*{SERVED}"):
            compiled("prefill", 75)


@pytest.mark.parametrize("length", LENGTHS)
def test_no_layer_multiplies_less_than_it_sees(length: int) -> None:
    """Tiles can only add to the pairs of the mask."""
    pattern = Triangle(n_init=8, n_local=512, last_n=128)
    seen = pattern.visible_pairs(length) * 4 * 32 * 128 / DEVICES["H200"].matmul_flop_s
    executed = predict_layer("H200", length, 8192).alone["tensor cores"]
    assert seen <= executed < 1.5 * seen
