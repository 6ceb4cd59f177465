"""Results for people: tables, the plot of score against tokens kept, and pictures of what was kept."""

from gripvlm.report.cells import Geometry, GeometryError, geometry
from gripvlm.report.picture import overlay
from gripvlm.report.plots import plot
from gripvlm.report.tables import markdown
from gripvlm.report.tables import tables as table
from gripvlm.report.tiles import Part, layout

__all__ = ["Geometry", "GeometryError", "Part", "geometry", "layout", "markdown", "overlay", "plot", "table"]
