"""What a width for each layer is worth against one width for all: the sweep's own trials, from runs' reports.

For each width that the sweep tried on all layers alike: the divergence that the front of its other trials has at as
many bytes, between two of them on a straight line of log divergence, over the one measured. Trials are evaluated on the
calibration inputs before levels are refitted, and bytes are those of the layers. Widths beside which the front has no
trial on one side are left out. The last line is one JSON object.

    python tests/benchmarks/bench_widths.py docs/results/lenet*_{mnist,fashion}-?/report.json
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np

from de_ray.quantization.pareto import Trial, make_trial, pareto


def compared(trials: list[Trial]) -> dict[int, tuple[int, float, float]]:
    """Width -> bytes and divergence of that width for all layers, and the others' divergence at as many bytes."""
    alike = [trial for trial in trials if len(set(trial.widths)) == 1]
    others = pareto([trial for trial in trials if trial not in alike])
    sizes, logs = [trial.bytes for trial in others], np.log([trial.divergence for trial in others])
    return {trial.widths[0]: (trial.bytes, trial.divergence, float(np.exp(np.interp(trial.bytes, sizes, logs))))
            for trial in pareto(alike) if sizes and sizes[0] <= trial.bytes <= sizes[-1]}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path, help="report.json of runs that swept widths")
    runs = []
    for path in parser.parse_args().reports:
        trials = [make_trial(trial["widths"], trial["bytes"], trial["divergence"])
                  for trial in json.loads(path.read_text())["trials"]]
        for width, (size, alike, searched) in sorted(compared(trials).items()):
            runs.append({"run": path.parent.name, "width": width, "bytes": size, "uniform": alike,
                         "searched": searched, "ratio": round(searched / alike, 3)})
            print(f"{path.parent.name}: {width} bits, {size} bytes: {alike:.4g} -> {searched:.4g}, "
                  f"{searched / alike:.2f}")
    medians = {width: statistics.median(run["ratio"] for run in runs if run["width"] == width)
               for width in sorted({run["width"] for run in runs})}
    print(json.dumps({"runs": runs, "median_ratio": medians}))


if __name__ == "__main__":
    main()
