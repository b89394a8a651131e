# Notes in an extension what it is built from, so that Python can tell when its sources have changed since.

# Writes built_from.h, which defines TICKETOPS_BUILT_FROM: a line "<SHA-256> <path>" for each file, as sha256sum prints
# them. `target` finds the header; a changed file has CMake run again.
function(ticketops_built_from target root)
  set(lines "")
  list(SORT ARGN)
  foreach(file IN LISTS ARGN)
    file(SHA256 "${root}/${file}" hash)
    string(APPEND lines "  \"${hash} ${file}\\n\" \\\n")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${root}/${file}")
  endforeach()
  file(CONFIGURE OUTPUT "${CMAKE_CURRENT_BINARY_DIR}/built_from.h"
    CONTENT "#define TICKETOPS_BUILT_FROM \\\n${lines}  \"\"\n" @ONLY)
  target_include_directories(${target} PRIVATE "${CMAKE_CURRENT_BINARY_DIR}")
endfunction()
