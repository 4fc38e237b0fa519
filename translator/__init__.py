"""Pure functions from objects to named Envoy resources: (world, proxy) -> resources and conditions.

One module an Envoy concept: ``clusters``, ``routes``, ``listeners``, ``secrets``; ``world`` says which
objects a proxy may see, ``translate`` puts the parts together.
"""
