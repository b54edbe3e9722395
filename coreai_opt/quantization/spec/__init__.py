"""Specifications of quantization, and the components that they name."""

from coreai_opt.quantization.spec.factory import *
from coreai_opt.quantization.spec.fake_quantize import fp4_forward as fp4_forward
from coreai_opt.quantization.spec.granularity import *
from coreai_opt.quantization.spec.qformulation import *
from coreai_opt.quantization.spec.qparams_calculator import *
from coreai_opt.quantization.spec.qscheme import *
from coreai_opt.quantization.spec.range_calculator import *
from coreai_opt.quantization.spec.range_estimators import EntropyRangeCalculator as EntropyRangeCalculator
from coreai_opt.quantization.spec.range_estimators import MSERangeCalculator as MSERangeCalculator
from coreai_opt.quantization.spec.range_estimators import (
    PercentileRangeCalculator as PercentileRangeCalculator,
)
from coreai_opt.quantization.spec.spec import *
