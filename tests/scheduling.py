"""Made-up sites for the tests of schedulers and options."""

from lorc_fx.options import Options
from lorc_fx.records import SiteSpec
from lorc_fx.schedulers import schedule

NAMES = ("progressive", "uniform", "energy")


def site(layer, kind="key", width=8, column=2, fixed=0, cond=10.0, spectrum=None, window=None):
    spectrum = tuple(1.0 / (1 + i) for i in range(width)) if spectrum is None else tuple(spectrum)
    return SiteSpec(layer, kind, width, column, fixed, width * column, cond, spectrum, window)


def model(layers=4, width=8, conds=None, **more):
    conds = conds or [10.0] * layers
    return [site(i, kind, width, cond=conds[i], **more) for i in range(layers) for kind in ("key", "value")]


def ranks_of(sites, stored):
    out = []
    for one, value in zip(sites, stored, strict=True):
        columns, rest = divmod(value - one.fixed_bytes, one.column_bytes)
        assert rest == 0
        out.append(columns)
    return out


def run(name, sites, budget, **options):
    return ranks_of(sites, schedule(name, sites, budget, Options(scheduler=name, **options)))
