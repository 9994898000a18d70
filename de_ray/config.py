"""The typed configuration: one dataclass a group, checked before anything starts.

The library never sees a Hydra or OmegaConf object: `launch.py` composes the configuration and hands over these
dataclasses. Each field's comment says its unit and its range; `__post_init__` holds users to it.
"""

from dataclasses import dataclass, field
from typing import Any

from de_ray.checks import require, require_choice, require_types

CRITERIA = ("uniform", "magnitude", "wanda", "fisher", "obs", "kronecker", "taylor")
SURROGATES = ("fisher", "kronecker")
DIVERGENCES = ("kl", "mse", "cosine")
AUGMENTATIONS = ("none", "shift", "cutmix", "auto")
DRAWS = ("uniform", "objects")
DARKNETS = ("yolov3_tiny", "yolov3")
DETECTORS = (*DARKNETS, "ultralytics", "fashion_scenes")
ULTRALYTICS = "ultralytics:"
"""Of architectures of that package, before the name of the YAML."""
RANDOM = "random"
"""In place of a path of weights."""
MOST_THREADS = 1024
"""Of a process: more than that end it, without a word that could be caught."""
WORKER_GPUS = 0.4
"""Of a GPU, for each of several workers of refit; evaluators, which stay where they are, have the rest: more than half,
so that a GPU has one of each."""
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass
class TeacherConfig:
    """Where the trained network comes from: given, or trained once with labels and cached."""

    checkpoint: str | None = None
    """A safetensors file or a `weights_only` state dict. None: train, or take from the cache."""
    epochs: int = 20
    """Passes over the labelled training set, >= 1."""
    batch: int = 128
    """Samples a training step, >= 1."""
    learning_rate: float = 1e-3
    """Adam's peak learning rate, > 0; decays to zero along a cosine."""
    weight_decay: float = 0.0
    """Decoupled weight decay, >= 0."""
    seed: int = 0
    """Of initialisation and shuffling. Apart from the run's seed, so that every seed compresses the same teacher."""

    def __post_init__(self) -> None:
        require_types(self, "problem.teacher.")
        require(self.epochs >= 1, "problem.teacher.epochs", self.epochs, "at least 1")
        require(self.batch >= 1, "problem.teacher.batch", self.batch, "at least 1")
        require(self.learning_rate > 0, "problem.teacher.learning_rate", self.learning_rate, "a number above 0")
        require(self.weight_decay >= 0, "problem.teacher.weight_decay", self.weight_decay, "0 or more")


@dataclass
class DataConfig:
    """The images of a detector."""

    root: str | None = None
    """A folder in the layout of COCO 2017: train2017/, val2017/, annotations/. None: `coco` under DE_RAY_DATA, or under
    datasets/ in the cache."""
    unlabelled: list[str] = field(default_factory=list)
    """More folders of images for calibration and refit, besides train2017."""
    size: int = 416
    """Side in pixels of the square that images are laid into, a multiple of the network's largest stride, >= 32."""
    workers: int = 2
    """Processes that read images, >= 0; 0: the run's own."""
    scenes: int = 4096
    """Training scenes of fashion_scenes, >= 16; a sixteenth as many are held out. Others leave it as it is."""
    draw: str = "uniform"
    """How images are drawn for calibration, saliency and refit: uniform, or objects, in proportion to the number of
    objects that the teacher expects in them."""
    mosaic: float = 0.25
    """Share of the augmented images that are four images at half their size, in [0, 1]."""
    emphasis: float = 0.0
    """How much more refit minds what the teacher is sure of, >= 0: a place that has an object with probability p counts
    1 + emphasis p times, so that a student that cannot tell errs towards seeing one. What is measured stays as it is;
    `problem.divergence=detection` alone."""

    def __post_init__(self) -> None:
        require_types(self, "problem.data.")
        require(self.size >= 32, "problem.data.size", self.size, "at least 32")
        require(self.workers >= 0, "problem.data.workers", self.workers, "0 or more")
        require(self.scenes >= 16, "problem.data.scenes", self.scenes, "at least 16")
        require_choice("problem.data.draw", self.draw, DRAWS)
        require(0 <= self.mosaic <= 1, "problem.data.mosaic", self.mosaic, "a number in [0, 1]")
        require(self.emphasis >= 0, "problem.data.emphasis", self.emphasis, "0 or more")


@dataclass
class ProblemConfig:
    """What is compressed: the teacher, its inputs, the divergence and the layers that may be zeroed."""

    name: str = "digits"
    """digits, lenet300_mnist, lenet5_mnist, lenet300_fashion, lenet5_fashion, yolov3_tiny, yolov3, ultralytics,
    fashion_scenes or custom."""
    model: str | None = None
    """`package.module:build`, a callable that returns the trained `nn.Module`; custom problems only."""
    calibration: str | None = None
    """An `.npy` file of inputs [N, ...], unlabelled, or an `.npz` file with those of several arguments by their names;
    custom problems only."""
    held_out: str | None = None
    """Such a file of inputs that only the report sees. None: the last fifth of `calibration`, kept apart."""
    calibration_size: int = 1024
    """Inputs on which candidates are evaluated, >= 1; taken from the training inputs with the run's seed."""
    inputs_size: int = 0
    """Training inputs that refit and saliency may use, >= 0; 0: all. Calibration inputs are among them."""
    divergence: str = "kl"
    """kl, mse or cosine; for detectors detection, mse or cosine."""
    include: list[str] = field(default_factory=lambda: ["*"])
    """Globs of layer names that may be zeroed; each must match a layer."""
    exclude: list[str] = field(default_factory=list)
    """Globs of layer names that stay dense; each must match a layer."""
    augment: str = "none"
    """Label-free augmentation of refit and calibration inputs: none, shift (of images: random translation by up to 1
    pixel along each axis), cutmix (the same, and rectangles of other images; of other inputs spans of each other), auto
    (cutmix, or none where the model does not take such inputs), or, for detectors, detection (mosaic, flip, scale,
    crop, colour, rectangles of other images)."""
    augment_share: float = 0.5
    """Share of the inputs that augmentation changes, in (0, 1]."""
    cfg: str | None = None
    """A Darknet `.cfg` in place of the package's; yolov3_tiny and yolov3 only."""
    weights: str | None = None
    """yolov3_tiny and yolov3: a Darknet `.weights` file, or random; None: the published name in `darknet` under
    DE_RAY_DATA, or under datasets/ in the cache. ultralytics: a checkpoint (`.pt`, a path, or a name in `ultralytics`
    under the same), or a `.yaml`, which gives an architecture for `teacher.checkpoint`, or random weights without."""
    trust_checkpoint: bool = False
    """Whether a pickle may be opened, which runs whatever code it holds; ultralytics only."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images of detectors."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The trained network."""

    def __post_init__(self) -> None:
        require_types(self, "problem.")
        detector = self.name in DETECTORS
        divergences = ("detection", "mse", "cosine") if detector else DIVERGENCES
        require_choice("problem.divergence", self.divergence, divergences)
        require_choice("problem.augment", self.augment, ("none", "detection") if detector else AUGMENTATIONS)
        require(0 < self.augment_share <= 1, "problem.augment_share", self.augment_share, "a number in (0, 1]")
        require(self.calibration_size >= 1, "problem.calibration_size", self.calibration_size, "at least 1")
        require(self.inputs_size >= 0, "problem.inputs_size", self.inputs_size, "0 (all inputs) or more")
        if self.name not in DARKNETS:
            require(self.cfg is None, "problem.cfg", self.cfg,
                    "nothing, unless problem is one of " + ", ".join(DARKNETS))
        if self.name == "ultralytics":
            require(bool(self.weights), "problem.weights", self.weights, "a .pt or .yaml file, for problem=ultralytics")
        else:
            require(not self.trust_checkpoint, "problem.trust_checkpoint", self.trust_checkpoint,
                    "nothing, unless problem=ultralytics")
        if self.name not in (*DARKNETS, "ultralytics"):
            require(self.weights is None, "problem.weights", self.weights,
                    "nothing, unless problem is one of " + ", ".join((*DARKNETS, "ultralytics")))
        require(not self.data.emphasis or self.divergence == "detection", "problem.data.emphasis", self.data.emphasis,
                f"0 for problem.divergence={self.divergence}, which knows of no objects")
        if not detector:
            require(self.data == DataConfig(), "problem.data", self.data,
                    "nothing, unless problem is one of " + ", ".join(DETECTORS))
        elif self.name == "fashion_scenes":
            own = DataConfig(size=self.data.size, scenes=self.data.scenes, mosaic=self.data.mosaic,
                             emphasis=self.data.emphasis)
            require(self.data == own, "problem.data", self.data,
                    "size, scenes, mosaic and emphasis alone, for problem=fashion_scenes")
        else:
            require(self.data.scenes == DataConfig.scenes, "problem.data.scenes", self.data.scenes,
                    "nothing, unless problem=fashion_scenes")
            trained = TeacherConfig(checkpoint=self.teacher.checkpoint if self.name == "ultralytics" else None)
            require(self.teacher == trained, "problem.teacher", self.teacher,
                    f"nothing that trains, since problem={self.name} is given its weights by problem.weights, and a "
                    "checkpoint for problem=ultralytics alone")
        if self.name == "custom":
            require(bool(self.model), "problem.model", self.model, "package.module:build, for problem=custom")
            require(bool(self.calibration), "problem.calibration", self.calibration,
                    "an .npy or .npz file, for problem=custom")
            require(self.teacher == TeacherConfig(checkpoint=self.teacher.checkpoint), "problem.teacher", self.teacher,
                    "a checkpoint alone, for problem=custom: its network is trained already")
        else:
            for key in ("model", "calibration", "held_out"):
                require(getattr(self, key) is None, f"problem.{key}", getattr(self, key),
                        "nothing, unless problem=custom")


@dataclass
class EvolutionConfig:
    """How zeroing sets are bred. `generations=0` with one criterion is that criterion's baseline."""

    method: str = "directed"
    """A name for reports and tracking; the other fields decide what is done."""
    sparsity: float = 0.9
    """Share of the zeroable weights that end as zeros, in [0, 1)."""
    allocation: str = "global"
    """global: one budget that evolution distributes over layers; uniform: `sparsity` in every layer."""
    targets: dict[str, float] = field(default_factory=dict)
    """Sparsity by layer glob, each in [0, 1); overrides `sparsity` for the layers that it matches."""
    cycles: int = 20
    """Cycles of propose, evaluate, breed, commit, refit; >= 1."""
    schedule: str | None = None
    """How density falls from 1 to its target over the cycles: exponential, linear, cubic, or adaptive (exponential
    with large steps while divergence is flat and small ones when it climbs). null: exponential where distillation
    brings the student back to the teacher between cycles, else cubic, whose last steps are small."""
    criteria: list[str] | None = None
    """Saliencies that propose: uniform, magnitude, wanda, fisher, obs, kronecker, taylor. null: fisher and magnitude,
    and taylor too where no distillation brings the student back to the teacher between cycles."""
    saliency_inputs: int = 2048
    """Unlabelled inputs of a cycle's saliencies, a fresh sample each cycle, >= 1."""
    saliency_batch: int = 64
    """Of those inputs, a pass, >= 1; fisher squares the gradient of each pass."""
    population: int = 12
    """Candidates a generation, >= 1."""
    generations: int = 3
    """Generations a cycle, >= 0; 0 commits the first criterion's top-k set without evaluating any."""
    oversample: int = 4
    """Children bred for each that is evaluated, >= 1: the least by `surrogate`'s estimate. 1: no estimates, nor
    where `rate_weight` is above 0, since they know nothing of bytes. Breeding is the work of the driver's cores: where
    ten thousands of candidates a second are evaluated, it may bind."""
    surrogate: str = "fisher"
    """Curvature that estimates children: fisher, the diagonal, or kronecker, which costs more and knows of pairs."""
    elite: int = 2
    """Candidates that survive unchanged, in [1, population]."""
    tournament: int = 3
    """Candidates that compete for each parent's place, in [1, population]."""
    crossover: float = 0.5
    """Share of children with two parents, in [0, 1]."""
    quota_sigma: float = 0.15
    """Standard deviation of a quota mutation, in natural log of a layer's density, in [0, 10]."""
    swap: float = 0.02
    """Share of a set's members that a swap mutation exchanges, in [0, 1]."""
    regrow: float = 0.01
    """Share of the survivors' number that may come back from earlier zeros in a cycle, in [0, 1]."""
    temperature: float = 0.3
    """Of Gumbel top-k over log saliency, in [0, 1000]; 0 draws the plain top-k."""
    rate_weight: float = 0.0
    """Weight of the file's size, >= 0: fitness is divergence x bytes^rate_weight, so that one percent of the bytes is
    worth as many percent of the divergence, and saliencies are divided by bits^min(1, rate_weight). 0: divergence
    alone."""
    screen: float = 0.25
    """Share of the calibration batches on which all candidates are raced before the better half sees them all,
    in (0, 1]; 1: no racing."""
    confirm: float = 0.25
    """Share of the calibration batches that breeding does not see, in [0, 1): the last choice of a cycle is made on
    them. 0: on the batches of breeding."""

    def __post_init__(self) -> None:
        key = "evolution."
        require_types(self, key)
        require(0 <= self.sparsity < 1, key + "sparsity", self.sparsity, "a number in [0, 1)")
        require_choice(key + "allocation", self.allocation, ("global", "uniform"))
        if self.schedule is not None:
            require_choice(key + "schedule", self.schedule, ("exponential", "linear", "cubic", "adaptive"))
        for pattern, target in self.targets.items():
            require(0 <= target < 1, f"{key}targets.{pattern}", target, "a number in [0, 1)")
        require(self.oversample >= 1, key + "oversample", self.oversample, "at least 1")
        require_choice(key + "surrogate", self.surrogate, SURROGATES)
        require(self.criteria is None or len(self.criteria) >= 1, key + "criteria", self.criteria,
                "null, or at least one of " + ", ".join(CRITERIA))
        for criterion in self.criteria or ():
            require_choice(key + "criteria", criterion, CRITERIA)
        require(self.cycles >= 1, key + "cycles", self.cycles, "at least 1")
        require(self.population >= 1, key + "population", self.population, "at least 1")
        require(self.generations >= 0, key + "generations", self.generations, "0 or more")
        for name in ("elite", "tournament"):
            require(1 <= getattr(self, name) <= self.population, key + name, getattr(self, name),
                    f"1 to evolution.population, which is {self.population}: lower this one too")
        require(self.saliency_inputs >= 1, key + "saliency_inputs", self.saliency_inputs, "at least 1")
        require(self.saliency_batch >= 1, key + "saliency_batch", self.saliency_batch, "at least 1")
        for name in ("crossover", "swap", "regrow"):
            require(0 <= getattr(self, name) <= 1, key + name, getattr(self, name), "a number in [0, 1]")
        require(0 < self.screen <= 1, key + "screen", self.screen, "a number in (0, 1]")
        require(0 <= self.confirm < 1, key + "confirm", self.confirm, "a number in [0, 1)")
        require(0 <= self.quota_sigma <= 10, key + "quota_sigma", self.quota_sigma, "a number in [0, 10]")
        require(self.rate_weight >= 0, key + "rate_weight", self.rate_weight, "0 or more")
        require(0 <= self.temperature <= 1000, key + "temperature", self.temperature, "a number in [0, 1000]")


@dataclass
class PoolConfig:
    """Where candidates are evaluated."""

    kind: str = "ray"
    """ray: actors; serial: in this process. Both give the same numbers, bit for bit."""
    actors: int = 0
    """Ray actors, >= 0; 0: one a GPU where there are GPUs, else one a CPU core of the cluster."""
    gpus: float | None = None
    """GPUs an actor, >= 0; fractions share a device, 0 keeps actors on CPUs. None: 1 where the cluster has GPUs or,
    with `autoscale`, no machine yet that does work."""
    autoscale: bool = False
    """Whether actors that the cluster has no room for are started all the same, for its autoscaler to start machines
    for them. The run begins with the first."""
    threads: int = 1
    """CPU threads an evaluator, >= 1. Part of the result: other counts may round differently."""
    batch: int = 256
    """Calibration inputs a forward pass, >= 1."""
    stack: int = 8
    """Candidates of the same layers that share a pass, >= 1; also the most that travel in one task. Fewer where
    `pool.cache_mb`, or a CPU's caches, have no room for them. Part of the result: other counts may round
    differently."""
    cache_mb: int = 1024
    """Megabytes of activations that an evaluator keeps between passes, and as many for a stack of candidates, >= 1."""
    screen_precision: str = "float32"
    """Of a race's first heat: float32, tf32 (GPUs alone) or bfloat16. Every later evaluation is float32."""
    task_seconds: float = 900.0
    """Seconds after which an actor that has not answered a task is taken for hung and replaced, > 0; its start and the
    capture of the network count too."""

    def __post_init__(self) -> None:
        require_types(self, "pool.")
        require(self.stack >= 1, "pool.stack", self.stack, "at least 1")
        require(self.cache_mb >= 1, "pool.cache_mb", self.cache_mb, "at least 1")
        require_choice("pool.screen_precision", self.screen_precision, PRECISIONS)
        require(self.task_seconds > 0, "pool.task_seconds", self.task_seconds, "a number above 0")
        require_choice("pool.kind", self.kind, ("ray", "serial"))
        require(self.actors >= 0, "pool.actors", self.actors, "0 (one a device) or more")
        require(self.gpus is None or self.gpus >= 0, "pool.gpus", self.gpus, "0 or more, or null to choose by itself")
        require(1 <= self.threads <= MOST_THREADS, "pool.threads", self.threads, f"1 to {MOST_THREADS}")
        require(self.batch >= 1, "pool.batch", self.batch, "at least 1")

    @property
    def gpus_beside_workers(self) -> float:
        """GPUs an actor where several workers of refit compute on them; 0 in this process, of which Ray knows none."""
        if self.kind == "serial":
            return 0.0
        return 1 - WORKER_GPUS if self.gpus is None else self.gpus


@dataclass
class RefitConfig:
    """How survivors are brought back to the teacher, without labels."""

    method: str = "distill"
    """distill, least_squares (closed form per row), obs (column by column, for layers whose rows are too long for
    that) or none."""
    steps: int = 100
    """Distillation steps after each cycle, >= 0."""
    final_steps: int = 2000
    """Distillation steps after the last cycle, >= 0; their learning rate decays to zero along a cosine."""
    batch: int = 128
    """Inputs a step, >= 1."""
    memory_mb: int = 4096
    """Memory in MB that the activations of a pass may take, >= 1: larger batches, of refit and of saliencies, go in
    parts, whose gradients add up."""
    precision: str = "float32"
    """Of the networks' passes in a step: float32, tf32 (GPUs alone) or bfloat16. Weights, moments and divergence are
    float32."""
    learning_rate: float = 2e-2
    """Adam's learning rate between cycles, > 0; the highest one with `backoff`, the only one without."""
    final_learning_rate: float | None = None
    """Peak learning rate of the steps after the last cycle, > 0; None: `learning_rate`, or four times what `backoff`
    has made of it by then, where that is less. Between cycles small steps keep what the teacher knows; what is left of
    it at the end may need larger ones."""
    backoff: bool = True
    """Whether a refit after which the divergence is more than four times what it was, and more than
    `quantization.negligible`, is undone, and the next ones take a quarter of the rate, which doubles again with each
    between cycles that halves the divergence. What ends a stage, the steps after the last cycle as a whole and the
    refit of quantized levels, is undone where it raises the divergence, and leaves more than `quantization.negligible`.
    Such steps are taken again at a quarter of the rate, three times at most, before they are left out."""
    relative: bool = True
    """Whether learning rates, that of quantization included, are relative to the size of each tensor, the root mean
    square of its survivors. Those sizes differ by factors of hundreds once batch norm is folded. False: steps of one
    size for all tensors, which ask for rates of about a tenth."""
    workers: int = 1
    """Processes that share each batch of distillation, >= 1 and a divisor of `batch`. Where `device` is a GPU each has
    one of the cluster's GPUs, beside the evaluator that is there; else `threads` threads. Other counts round
    differently."""
    damping: float = 0.01
    """Ridge of least_squares and obs, as a share of the mean diagonal of the inputs' Gram matrix, > 0."""

    def __post_init__(self) -> None:
        require_types(self, "refit.")
        require_choice("refit.method", self.method, ("distill", "least_squares", "obs", "none"))
        require(self.steps >= 0, "refit.steps", self.steps, "0 or more")
        require(self.final_steps >= 0, "refit.final_steps", self.final_steps, "0 or more")
        require(self.batch >= 1, "refit.batch", self.batch, "at least 1")
        require(self.memory_mb >= 1, "refit.memory_mb", self.memory_mb, "at least 1")
        require_choice("refit.precision", self.precision, PRECISIONS)
        require(self.learning_rate > 0, "refit.learning_rate", self.learning_rate, "a number above 0")
        require(self.final_learning_rate is None or self.final_learning_rate > 0, "refit.final_learning_rate",
                self.final_learning_rate, "a number above 0, or null")
        require(self.workers >= 1 and self.batch % self.workers == 0, "refit.workers", self.workers,
                f"at least 1, and a divisor of refit.batch={self.batch}")
        require(self.damping > 0, "refit.damping", self.damping, "a number above 0")


@dataclass
class QuantizationConfig:
    """How survivors become a few levels a layer."""

    bits: int | None = None
    """Width of every layer, in 1..8. None: Ray Tune sweeps a width for each layer."""
    min_bits: int = 1
    """Narrowest width of the sweep, in 1..max_bits."""
    max_bits: int = 8
    """Widest width of the sweep, in min_bits..8."""
    placement: str = "ecsq"
    """Level placement: ecsq (entropy-constrained), lloyd (exact Lloyd-Max) or uniform."""
    rate_weight: float = 1.0
    """Weight of the rate in ecsq, relative to the slope of the layer's own distortion-rate curve; >= 0."""
    row_scales: str = "auto"
    """A scale per output row: auto (where it pays its bytes), always or never."""
    tolerance: float = 0.3
    """Rise of the calibration divergence that widths may cause before levels are refitted, relative to the pruned
    student's; > 0. Large embeddings may add as much of it as of the file's numbers are theirs."""
    negligible: float = 1e-3
    """A divergence that does not matter, >= 0: `tolerance` is relative to no less. In the divergence's unit; where a
    constant output, the teacher's mean one, would cost less than 1, in multiples of what it would cost."""
    feedback_bits: int = 2
    """Widest layers, in 0..8, in which survivors that are still to be rounded make up for the errors of those that have
    been, once widths are chosen. Of wider ones the refit of levels does as well, in a smaller file; without it, 8."""
    trials: int = 16
    """Trials of the sweep, >= 1, the warm starts included."""
    refit_steps: int = 500
    """Distillation steps for levels and biases once widths are chosen, >= 0."""
    learning_rate: float = 2e-3
    """Of those steps, > 0; see `refit.relative`."""

    def __post_init__(self) -> None:
        key = "quantization."
        require_types(self, key)
        if self.bits is not None:
            require(1 <= self.bits <= 8, key + "bits", self.bits, "a whole number in 1..8, or null to sweep")
        require(1 <= self.max_bits <= 8, key + "max_bits", self.max_bits, "a whole number in 1..8")
        require(1 <= self.min_bits <= self.max_bits, key + "min_bits", self.min_bits,
                "a whole number in 1..quantization.max_bits")
        require_choice(key + "placement", self.placement, ("ecsq", "lloyd", "uniform"))
        require_choice(key + "row_scales", self.row_scales, ("auto", "always", "never"))
        require(self.rate_weight >= 0, key + "rate_weight", self.rate_weight, "0 or more")
        require(self.tolerance > 0, key + "tolerance", self.tolerance, "a number above 0")
        require(self.negligible >= 0, key + "negligible", self.negligible, "0 or more")
        require(0 <= self.feedback_bits <= 8, key + "feedback_bits", self.feedback_bits, "a whole number in 0..8")
        require(self.trials >= 1, key + "trials", self.trials, "at least 1")
        require(self.refit_steps >= 0, key + "refit_steps", self.refit_steps, "0 or more")
        require(self.learning_rate > 0, key + "learning_rate", self.learning_rate, "a number above 0")


@dataclass
class TrackingConfig:
    """Where parameters, metrics and artifacts go besides the run's folder."""

    enabled: bool = True
    """Track with MLflow."""
    uri: str | None = None
    """An MLflow tracking URI. None: the environment's MLFLOW_TRACKING_URI, or `sqlite:///mlflow.db` in the working
    folder."""
    experiment: str | None = None
    """The MLflow experiment's name. None: de-ray and the problem's name, since only runs of one problem compare."""
    system_metrics: bool = True
    """Sample processors, memory, disk and network."""
    model: bool = True
    """Log the compressed network, so that `mlflow.pyfunc.load_model` predicts with it."""
    register: str | None = None
    """A name in MLflow's model registry, of which the compressed network becomes a new version; needs `model`."""

    def __post_init__(self) -> None:
        require_types(self, "tracking.")
        require(self.model or self.register is None, "tracking.register", self.register,
                "nothing, unless tracking.model=true")


@dataclass
class SweepConfig:
    """Whole compressions as trials of Ray Tune, `+sweep=tune`; conf/sweep/tune.yaml has an example."""

    space: dict[str, Any] = field(default_factory=dict)
    """Values by key, nested as the configuration is, of the groups evolution, refit and quantization and of seed. A
    list is tried in all combinations with other lists; {low, high} or {low, high, log: true} is a range to draw from,
    of whole numbers where both ends are; a single value is fixed."""
    samples: int = 1
    """Draws from the ranges for each combination of lists, >= 1. Without ranges: one."""
    asha: bool = True
    """Stop a trial whose divergence, at a rung of sparsity, is among the worse of those that have come as far. Trials
    that aim at other listed sparsities are no rivals."""
    first_rung: float = 0.5
    """Sparsity of the first rung, in (0, 1)."""
    reduction: float = 2.0
    """One of so many trials goes on at a rung, and each rung has so many times the log density of the one before;
    > 1."""
    concurrent: int = 0
    """Trials at a time, >= 0; 0: as many as there is room for."""
    actors: int = 0
    """Ray actors that evaluate for one trial, >= 0; 0: a trial evaluates in its own process. A trial takes
    `threads` CPUs and each of its actors `pool.threads`, all reserved before it starts."""
    gpus: float = 0.0
    """GPUs of a trial, >= 0, such as 0.25 for four trials on each; 0: trials compute on CPUs."""
    metric: str | None = None
    """What the ratio is weighed against: a metric of the report, or divergence (held out). None: the first metric."""
    tolerance: float = 0.01
    """The best trial is the smallest file whose metric is worse than the teacher's by no more than this share of it;
    > 0. For metrics that are 0 for the teacher: by no more than this."""

    def __post_init__(self) -> None:
        key = "sweep."
        require_types(self, key)
        require(bool(self.space), key + "space", self.space,
                "values by key, such as {evolution: {sparsity: [0.8, 0.9]}}")
        require(self.samples >= 1, key + "samples", self.samples, "at least 1")
        require(0 < self.first_rung < 1, key + "first_rung", self.first_rung, "a number in (0, 1)")
        require(self.reduction > 1, key + "reduction", self.reduction, "a number above 1")
        require(self.concurrent >= 0, key + "concurrent", self.concurrent, "0 (as many as there is room for) or more")
        require(self.actors >= 0, key + "actors", self.actors, "0 (a trial's own process) or more")
        require(self.gpus >= 0, key + "gpus", self.gpus, "0 or more")
        require(self.tolerance > 0, key + "tolerance", self.tolerance, "a number above 0")


@dataclass
class ClusterConfig:
    """On which machines a run takes place; none of it changes the result. `+cluster=NAME` chooses from conf/cluster."""

    address: str | None = None
    """Of the Ray cluster to join: auto (the one that this machine is a node of), HOST:PORT, or local (Ray on this
    machine alone, for this run). None: RAY_ADDRESS where it is set, else local."""
    storage: str | None = None
    """Where the run's folder is mirrored and Tune keeps its records: s3://BUCKET/FOLDER, or a path on a disk that all
    nodes share. None: nowhere but in the run's folder, which then must be on such a disk for Tune on several nodes."""
    submit: bool = False
    """Send the command to the cluster behind `dashboard` as a Ray job, show its log, and end with its exit code."""
    dashboard: str | None = None
    """Of the cluster, for submit and attach: http://HOST:PORT or https://..., without a user's name or password."""
    attach: str | None = None
    """Id of a job that was submitted before: show its log and end with its exit code."""
    patience: float = 600.0
    """Seconds for which a lost connection to the dashboard is tried again, >= 0."""

    def __post_init__(self) -> None:
        key = "cluster."
        require_types(self, key)
        port = (self.address or "").rpartition(":")[2]
        require(self.address in (None, "auto", "local") or "://" not in self.address and ":" in self.address
                and port.isdecimal() and 0 < int(port) < 2**16, key + "address", self.address,
                "auto, local, HOST:PORT of a cluster's head, or null; from outside the cluster use cluster.submit=true")
        for name in ("storage", "dashboard"):
            text = getattr(self, name)
            # The value is not shown: it may hold a password.
            require(text is None or "@" not in text.partition("://")[2].partition("/")[0], key + name, "...@...",
                    "no user's name or password in it; they belong in the environment, or in the machines' own role")
        require(self.storage is None or bool(self.storage.strip("/ ")), key + "storage", self.storage,
                "s3://BUCKET/FOLDER, or a path on a disk that all nodes share")
        require(self.dashboard is None or self.dashboard.startswith(("http://", "https://")), key + "dashboard",
                self.dashboard, "http://HOST:PORT or https://...")
        require(not (self.submit and self.attach), key + "attach", self.attach, "nothing beside cluster.submit=true")
        require(self.dashboard is not None or not (self.submit or self.attach), key + "dashboard", self.dashboard,
                "http://HOST:PORT, for cluster.submit and cluster.attach")
        require(self.patience >= 0, key + "patience", self.patience, "0 or more")


@dataclass
class Config:
    """A whole run."""

    problem: ProblemConfig = field(default_factory=ProblemConfig)
    """What is compressed."""
    evolution: EvolutionConfig = field(default_factory=EvolutionConfig)
    """How zeroing sets are bred."""
    pool: PoolConfig = field(default_factory=PoolConfig)
    """Where candidates are evaluated."""
    refit: RefitConfig = field(default_factory=RefitConfig)
    """How survivors are brought back to the teacher."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """How survivors become levels."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where results go besides the run's folder."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """On which machines."""
    sweep: SweepConfig | None = None
    """Many compressions in place of one; None: one."""
    target_bytes: int | None = None
    """Size that the file may have, >= 1: sparsity and the rate's weight in level placement are then found, in place of
    `evolution.sparsity`, `quantization.tolerance` and `quantization.rate_weight`. None: the file is as large as it
    gets."""
    target_ratio: float | None = None
    """The same as a ratio, 4 bytes x the teacher's parameters / bytes of the file, > 1."""
    seed: int = 0
    """Of every random draw of the compression, in 0..2^63 - 1."""
    device: str = "auto"
    """Where refit runs: auto (a GPU where there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads of refit, >= 1. Part of the result: other counts may round differently. None: all cores, or fewer for
    small networks, where threads wait for each other longer than they compute; 1 in a sweep's trials, and in each of
    several `refit.workers`."""
    minutes: float | None = None
    """Minutes that the compression may take, about, > 0. A schedule that would take longer, by a few steps and passes
    that are timed here, is cut: cycles, candidates, steps and `refit.batch`. What it comes to is what is saved, so that
    `resume` goes on with it. None: the schedule as it is."""
    start: str | None = None
    """A compressed file of the same teacher, whose student evolves further, in place of the teacher's own weights. The
    schedule goes on from its density; weights that return in a search have the teacher's values. Of a file sparser than
    the sparsity or targets asked for (not than a size would need), weights first come back, where there is a refit."""
    resume: str | None = None
    """The folder of an interrupted run, or its mirror (s3://...), to be continued to the same file. Overrides of
    `cluster` are taken beside it, no others."""

    def __post_init__(self) -> None:
        require_types(self)
        require(self.target_bytes is None or self.target_bytes >= 1, "target_bytes", self.target_bytes,
                "at least 1, or null")
        require(self.target_ratio is None or self.target_ratio > 1, "target_ratio", self.target_ratio,
                "a number above 1, or null")
        require(self.target_bytes is None or self.target_ratio is None, "target_ratio", self.target_ratio,
                f"null beside target_bytes={self.target_bytes}, which says the same")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        require(self.minutes is None or self.minutes > 0, "minutes", self.minutes, "a number above 0, or null")
        require(self.minutes is None or self.sweep is None, "minutes", self.minutes,
                "null beside a sweep, whose trials are compared by schedules of one length")
        require(self.threads is None or 1 <= self.threads <= MOST_THREADS, "threads", self.threads,
                f"1 to {MOST_THREADS}, or null to choose by itself")
        require(self.device in ("auto", "cpu") or self.device.split(":")[0] == "cuda", "device", self.device,
                "auto, cpu, cuda or cuda:N")
