"""Results for people: tables, plots, pictures of what was kept, and pages of all of them."""

from gripvlm.report.cells import Geometry, GeometryError, geometry
from gripvlm.report.picture import overlay
from gripvlm.report.plots import plot
from gripvlm.report.tables import markdown
from gripvlm.report.tables import tables as table
from gripvlm.report.tiles import Part, layout
from gripvlm.report.write import report

__all__ = ["Geometry", "GeometryError", "Part", "geometry", "layout", "markdown", "overlay", "plot", "report", "table"]
