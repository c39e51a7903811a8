"""Which passes there are: the built-in ones and those of installed packages.

A package adds passes through the entry point group ``pwopt.passes``::

    [project.entry-points."pwopt.passes"]
    my-pass = "my_package.my_pass:MyPass"
"""

from importlib.metadata import EntryPoint, entry_points

from pwopt.errors import PwoptError
from pwopt.passes.bottleneck import Bottleneck
from pwopt.passes.conv_to_gemm import ConvToGemm
from pwopt.passes.fold_affine import FoldAffine
from pwopt.passes.fold_affine_before import FoldAffineBefore
from pwopt.passes.fold_pad import FoldPad
from pwopt.passes.fuse_siblings import FuseSiblings
from pwopt.passes.gemm_to_conv import GemmToConv
from pwopt.passes.hoist_stride import HoistStride
from pwopt.passes.merge_linear_convs import MergeLinearConvs
from pwopt.passes.pool_before_pointwise import PoolBeforePointwise
from pwopt.passes.relu_bottlenecks import ReluBottlenecks
from pwopt.rewriting import Pass, Pipeline
from pwopt.spec import parse_pipeline

GROUP = "pwopt.passes"

_BUILT_IN: tuple[type[Pass], ...] = (
    FoldAffine,
    FoldPad,
    FoldAffineBefore,
    MergeLinearConvs,
    PoolBeforePointwise,
    HoistStride,
    FuseSiblings,
    GemmToConv,
    ConvToGemm,
    Bottleneck,
    ReluBottlenecks,
)


def passes() -> dict[str, type[Pass]]:
    """Return name → pass, built-in ones first.

    Raises:
        PwoptError: an installed package's pass cannot be loaded, is no Pass, or takes a name
            that is taken.
    """
    known = {kind.name: kind for kind in _BUILT_IN}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        kind = _load(entry)
        if kind.name in known:
            raise PwoptError(f"{_origin(entry)}: there is already a pass '{kind.name}'; rename it")
        known[kind.name] = kind
    return known


def pipeline(spec: str) -> Pipeline:
    """Build a pipeline from text, as in ``fold-affine,bottleneck{rank=64}``.

    Raises:
        SpecError: unknown pass or option, bad value, bad syntax.
    """
    return parse_pipeline(spec, passes())


def _load(entry: EntryPoint) -> type[Pass]:
    try:
        kind = entry.load()
    except Exception as error:
        raise PwoptError(
            f"{_origin(entry)}: cannot be loaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())}); upgrade or uninstall that package"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Pass) and hasattr(kind, "name")):
        raise PwoptError(f"{_origin(entry)}: is not a Pass; uninstall or mend that package")
    return kind


def _origin(entry: EntryPoint) -> str:
    package = entry.dist.name if entry.dist else "an installed package"
    return f"pass '{entry.name}' of {package}"
