"""Shifts: families of input perturbations with severities, to ask every question again on shifted data."""

from bayesguard.shift.base import Composed as Composed
from bayesguard.shift.base import ImageShift as ImageShift
from bayesguard.shift.base import Shift as Shift
from bayesguard.shift.content import Blend as Blend
from bayesguard.shift.content import Erasing as Erasing
from bayesguard.shift.content import PatchShuffle as PatchShuffle
from bayesguard.shift.corruption import EXTRA as EXTRA
from bayesguard.shift.corruption import STANDARD as STANDARD
from bayesguard.shift.corruption import Corruption as Corruption
from bayesguard.shift.geometric import Rotation as Rotation
from bayesguard.shift.geometric import Translation as Translation
from bayesguard.shift.severities import SEVERITIES as SEVERITIES
from bayesguard.shift.suites import OVADIA as OVADIA
from bayesguard.shift.suites import pairs as pairs
from bayesguard.shift.suites import suite as suite
from bayesguard.shift.tabular import FeatureNoise as FeatureNoise
