# The Python module for CUDA, and the same sources for the tests' stand-in for a device. Kernels are
# compiled apart from the module: nvcc sees no Python, and CUB is in one translation unit.
#
# The cap: one update for each optimizer, stored type and rounding (8 x 5: float32 is stored unrounded) and 6
# lookups (3 stored types x 2 charges), the rest once. An architecture costs about 100 seconds of one
# core, and 3 MB.

set(cuda_module bindings/cuda/module.cpp bindings/tensor.cpp)
set(cuda_kernels ${PROJECT_SOURCE_DIR}/bindings/cuda/kernels.cu
                 ${PROJECT_SOURCE_DIR}/bindings/cuda/sort.cu)

# A file for each entry of BuiltinOptimizers; kernels.cu asserts that they were counted right.
set(optimizer_header ${PROJECT_SOURCE_DIR}/include/coldrow/policy/optimizer.hpp)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${optimizer_header})
file(READ ${optimizer_header} optimizers)
string(REGEX MATCH "using BuiltinOptimizers =[^;]*" optimizers "${optimizers}")
string(REGEX MATCHALL "," commas "${optimizers}")
list(LENGTH commas last_optimizer)
math(EXPR optimizer_count "${last_optimizer} + 1")
foreach(number RANGE ${last_optimizer})
  set(source ${CMAKE_CURRENT_BINARY_DIR}/cuda/update_${number}.cu)
  file(CONFIGURE OUTPUT ${source} CONTENT
       "#include \"@PROJECT_SOURCE_DIR@/bindings/cuda/update.cuh\"\n\nCOLDROW_INSTANTIATE_UPDATES(@number@)\n"
       @ONLY)
  list(APPEND cuda_kernels ${source})
endforeach()

set(build_cuda OFF)
if(NOT COLDROW_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "COLDROW_CUDA: got ${COLDROW_CUDA}, accepted: AUTO, ON, OFF")
elseif(COLDROW_CUDA)
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(build_cuda ON)
  elseif(COLDROW_CUDA STREQUAL "ON")
    message(FATAL_ERROR "COLDROW_CUDA=ON needs a CUDA compiler: put nvcc on PATH, or name it in CUDACXX")
  else()
    message(STATUS "No CUDA compiler: coldrow is built for the CPU alone")
  endif()
endif()

if(build_cuda)
  # Whoever says what to build for is followed: coldrow's option, CMake's, CMake's environment variable.
  set(architectures ${COLDROW_CUDA_ARCHITECTURES})
  if(NOT architectures)
    set(architectures ${CMAKE_CUDA_ARCHITECTURES})
  endif()
  if(NOT architectures)
    set(architectures $ENV{CUDAARCHS})
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  if(NOT architectures)
    # Machine code for the common ones, and PTX of the newest for what comes after it.
    set(architectures 80-real 90)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      set(architectures 80-real 90-real 100)
    endif()
  endif()
  message(STATUS "CUDA architectures: ${architectures}")

  add_library(cuda_kernels OBJECT ${cuda_kernels})
  target_link_libraries(cuda_kernels PRIVATE coldrow coldrow_strict)
  target_compile_definitions(cuda_kernels PRIVATE COLDROW_OPTIMIZERS=${optimizer_count})
  # (-std, because CMake may be older than the compiler.)
  target_compile_options(
    cuda_kernels PRIVATE -std=c++20 $<$<COMPILE_LANG_AND_ID:CUDA,NVIDIA>:-Xfatbin=-compress-all
                         $<$<BOOL:${COLDROW_WERROR}>:-Werror=all-warnings>>)
  set_target_properties(
    cuda_kernels
    PROPERTIES CUDA_ARCHITECTURES "${architectures}" CUDA_VISIBILITY_PRESET hidden
               VISIBILITY_INLINES_HIDDEN ON POSITION_INDEPENDENT_CODE ON)

  # (A domain of its own: both modules know a type of the name Update.)
  nanobind_add_module(_cuda ${nanobind_mode} NB_DOMAIN coldrow_cuda ${cuda_module})
  target_link_libraries(_cuda PRIVATE coldrow coldrow_strict coldrow_warnings cuda_kernels
                                      CUDA::cudart_static)
  set_target_properties(_cuda PROPERTIES LINKER_LANGUAGE CXX)
  install(TARGETS _cuda LIBRARY DESTINATION coldrow)
endif()

# Never installed. Kernels run on the host, so they are compiled as C++, each from a file that includes it.
if(COLDROW_STAND_IN)
  set(stand_in_sources)
  foreach(source IN LISTS cuda_kernels)
    get_filename_component(name ${source} NAME_WE)
    set(wrapper ${CMAKE_CURRENT_BINARY_DIR}/stand_in/${name}.cpp)
    file(CONFIGURE OUTPUT ${wrapper} CONTENT "#include \"simt_runtime.hpp\"\n#include \"${source}\"\n")
    list(APPEND stand_in_sources ${wrapper})
  endforeach()
  nanobind_add_module(stand_in NB_STATIC NB_DOMAIN coldrow_stand_in ${cuda_module} ${stand_in_sources})
  target_include_directories(stand_in PRIVATE tests/cpp/device)
  target_compile_definitions(stand_in PRIVATE COLDROW_SIMT COLDROW_OPTIMIZERS=${optimizer_count})
  target_compile_options(stand_in PRIVATE -O1 -fno-strict-aliasing)
  target_link_libraries(stand_in PRIVATE coldrow coldrow_strict coldrow_warnings)
  set_target_properties(stand_in PROPERTIES OUTPUT_NAME _cuda LIBRARY_OUTPUT_DIRECTORY stand_in)
endif()
