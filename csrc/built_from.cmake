# Records the hashes of an extension's sources in it, so that Python can tell if the sources have changed since the
# build.

# Writes built_from.h, which defines TICKETOPS_BUILT_FROM as a string with a line "<SHA-256> <path>" for each file. Adds
# the header's folder to the include path of `target`, and reruns CMake when one of the files changes.
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
