import compare
import pytest


def row(method, seed, domain, accuracy):
    return {"method": method, "seed": seed, "domain": domain, "accuracy": accuracy}


def test_differences_are_paired_by_seed():
    lora, flat = {0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.6, 1: 0.8, 2: 1.0}  # always 0.1 apart
    rows = [row("lora", seed, "a", y) for seed, y in lora.items()]
    rows += [row("flat", seed, "a", flat[seed]) for seed in (2, 0, 1)]
    for line in compare.summary(rows):
        assert (line["lora"], line["flat"]) == pytest.approx((0.7, 0.8))
        assert (line["difference"], line["low"], line["high"]) == pytest.approx((0.1, 0.1, 0.1))


def test_the_interval_is_students():
    rows = [row("lora", seed, "a", 0.5) for seed in range(3)]
    rows += [row("flat", seed, "a", 0.5 + d) for seed, d in enumerate((0.0, 0.1, 0.2))]
    line = compare.summary(rows)[0]
    half = 4.302653 * 0.1 / 3**0.5  # t of 2 degrees of freedom
    assert (line["low"], line["high"]) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)


def test_an_interrupted_comparison_goes_on(arguments, monkeypatch, tmp_path):
    folder = tmp_path / "runs"
    arguments = [*arguments, "--output_dir", str(folder), "--steps", "2"]
    first = compare.main([*arguments, "--seeds", "0", "1"])
    whole = (folder / "runs.csv").read_text()
    header, *rows = whole.splitlines()
    assert header == "method,seed,domain,examples,correct,accuracy" and len(rows) == 2 * 2 * 2
    (folder / "runs.csv").write_text("\n".join([header, *rows[:6]]) + "\n")  # the last run is lost

    calls = []
    run = compare.run
    monkeypatch.setattr(compare, "run", lambda *args: calls.append(args[:2]) or run(*args))
    assert compare.main([*arguments, "--seeds", "0", "1"]) == first
    assert calls == [("flat", 1)] and (folder / "runs.csv").read_text() == whole
    with pytest.raises(ValueError, match="other settings \\(rho\\)"):
        compare.main([*arguments, "--rho", "0.5"])


@pytest.mark.parametrize("seeds", [["0"], ["1", "1"]], ids=["one", "twice"])
def test_seeds_that_give_no_interval(arguments, seeds):
    with pytest.raises(ValueError, match="at least two different"):
        compare.main([*arguments, "--seeds", *seeds])
