# TEMPORARY while branches are merged
from fastlm.core.autocast import autocast_enabled as autocasts  # noqa
from fastlm.core.autocast import cast_for_autocast as lowered  # noqa
from fastlm.core.errors import *  # noqa
from fastlm.core.errors import check_choice, mismatch  # noqa
from fastlm.core.tracing import PLAIN_TYPES as PLAIN  # noqa
from fastlm.core.tracing import distinct, needs_custom_op as opaque, none_to_empty as present  # noqa
